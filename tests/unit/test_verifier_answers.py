"""Correct answers of every kind for a reference, one pair per line."""

from __future__ import annotations

import pytest
from answer_pairs import pairs

from megatron_g2rl.rewards import verify_math

RIGHT = r"""
\frac{8}{3} <- 2\frac{2}{3}
8/3 <- 2 2/3
\frac{8}{3} <- 2 \frac23
-\frac{8}{3} <- -2\frac{2}{3}
1/2 <- \dfrac12
1000000 <- 1 000 000
1000000 <- 1,000,000
1000000 <- 1\,000\,000
1234 <- 1,234
1234 <- 1{,}234
10080 <- 10,\!080
\sqrt{8} <- 2\sqrt2
\sqrt{8} <- 2√2
\frac{1}{\sqrt2} <- \frac{\sqrt{2}}{2}
\sqrt{3+2\sqrt2} <- 1+\sqrt2
\sqrt[3]{54} <- 3\sqrt[3]{2}
\sqrt[3]{-8} <- -2
\sin^2 x <- 1-\cos^2 x
\sin 2x <- 2\sin x\cos x
\tan x <- \frac{\sin x}{\cos x}
\cos(2x) <- 1-2\sin^2(x)
\ln(x^2) <- 2\ln|x|
\log 100 <- 2
\log_2 8 <- 3
\ln 8 <- 3\ln 2
e^{2x} <- (e^x)^2
x^2-1 <- (x-1)(x+1)
\frac{x^2-1}{x-1} <- x+1
\frac{1}{3} <- 0.333333
0.5 <- 50\%
50\% <- 1/2
50 <- 50\%
100 <- 100 dollars
100 <- \$100
100 <- $100
100 <- 100 USD
\$5.00 <- 5
5 <- 5 cm
5 \text{ cm} <- 5cm
1 m <- 100 cm
1 \text{ m} <- 100 \text{ cm}
5\text{ m} <- 5 m
5\text{ m} <- 5m
60 \text{ km/h} <- 60 km/h
60 \text{ mph} <- 60 miles per hour
15\mbox{ cm}^2 <- 15 square centimeters
15\mbox{ cm}^2 <- 15 cm^2
864 \mbox{ inches}^2 <- 864
90^\circ <- 90
90^\circ <- 90°
90^\circ <- 90 degrees
\sin 30^\circ <- 1/2
\infty <- +\infty
-\infty <- -∞
\pm 2 <- 2, -2
\pm 2 <- -2 \text{ or } 2
1\pm\sqrt{19} <- 1+\sqrt{19}, 1-\sqrt{19}
3 \pm 2\sqrt2 <- 3-2\sqrt2, 3+2\sqrt2
−5 <- -5
-5 <- −5
\{1,2,3\} <- \{3,2,1\}
1,2,3 <- \{3, 1, 2\}
\{1,1,2\} <- \{1,2\}
(1,2) <- (1, 2)
(1,2) <- \left(1,\frac{4}{2}\right)
[2,\infty) <- x\ge2
[2,\infty) <- x >= 2
(-\infty,2)\cup(2,\infty) <- x\ne 2
(-\infty,2)\cup(2,\infty) <- \mathbb{R}\setminus\{2\}
(0,5) <- 0<x<5
(-1,3) <- -1 < x < 3
x>2 <- (2,\infty)
x>2 <- 2<x
x > 2 <- x \in (2,\infty)
(-\infty,1)\cup(5,\infty) <- x<1 \text{ or } x>5
y=2x+1 <- y=1+2x
y=2x+1 <- 2x-y+1=0
y=2x+1 <- 2x+1
5x-7y+11z+4=0 <- -5x+7y-11z-4=0
x=5 <- 5
5 <- x=5
k=5 <- k = 5
A <- (A)
(A) <- A
A <- \text{(A)}
\text{(A)} <- (A) 12
C <- \textbf{(C)}\ 12
C <- C. 12
C <- C)
\text{Monday} <- monday
\text{even} <- Even
yes <- Yes
\text{yes} <- \text{Yes.}
12:30 <- 12:30
8:34 \text{ p.m.} <- 8:34 pm
3:4 <- 6:8
3:4 <- 3/4
March 5, 2021 <- 5 March 2021
March 5 <- March 5th
73 <- **73**
73 <- `73`
73 <- *73*
73 <- \textbf{73}
73 <- \(73\)
73 <- $73$
73 <- $$73$$
73 <- 73.
73 <- Answer: 73
6.02\times10^{23} <- 6.02e23
6.02\times10^{23} <- 6.02 \cdot 10^{23}
6.02\times10^{23} <- 602\times 10^{21}
6.02\times10^{23} <- 6.02 × 10²³
0.00012 <- 1.2e-4
3\times10^{-8} <- 0.00000003
x_1=1,x_2=2 <- x_1 = 1, x_2 = 2
0.\overline{3} <- 1/3
0.1\overline{6} <- \frac16
2.5 <- 5/2
2.5 <- 2½
\frac{\pi}{3} <- π/3
\begin{pmatrix} 1 \\ 2 \end{pmatrix} <- \begin{bmatrix}1\\2\end{bmatrix}
\begin{pmatrix} 1 \\ 2 \end{pmatrix} <- (1,2)
\binom{10}{3} <- 120
5! <- 120
2^{10} <- 1024
2^10 <- 1024
2**10 <- 1024
\frac{a}{b} <- a/b
xy <- yx
3\sqrt{13} <- \sqrt{117}
\emptyset <- \{\}
\emptyset <- ∅
\text{no solution} <- no solution
i <- \sqrt{-1}
6-5i <- -5i+6
\frac{1}{i} <- -i
\frac{20000}{\pi} <- 20000/\pi
\sqrt2 <- \sqrt2 \approx 1.414
\frac{1}{3} <- \frac13 \approx 0.33
1.41 <- \sqrt{2} \approx 1.41
8/3 <- 2.6666666666666665
\sqrt2 <- 1.4142135623730951
\pi <- 3.14159
3000000 <- 3 million
36 <- 3 dozen
5 <- {5}{1}
5 <- y = 5
(5,6) <- x = 5, y = 6
5 <- \{5\}
5 <- \lfloor 5.5 \rfloor
5 <- 5.000
1/3 <- 0.333333333333333333333333333333
a <- \text{a}
100 <- 100 meters
100 <- 100 red apples
100 <- 100%
1.5 <- 150\%
2 hours <- 120 minutes
5 \text{ feet } 6 \text{ inches} <- 66 inches
1 <- \sin^2 x + \cos^2 x
\frac{\sqrt{6}+\sqrt{2}}{4} <- \cos 15^\circ
\frac{\sqrt{6}+\sqrt{2}}{4} <- \cos\frac{\pi}{12}
2\cos\frac{\pi}{5} <- \frac{1+\sqrt5}{2}
\arctan 1 <- \frac{\pi}{4}
\tan^{-1}(1) <- \pi/4
n! <- n(n-1)!
\frac{n(n+1)}{2} <- \binom{n+1}{2}
2^{n+1} <- 2\cdot2^n
(-1)^n <- (-1)^{n+2}
x^{1/3} <- \sqrt[3]{x}
\frac{1}{x^{2}} <- x^{-2}
x \in [-2,7] <- [-2,7]
x \in [-2,7] <- -2\le x\le 7
\text{Evelyn} <- Evelyn
2021-03-05 <- 2021-3-5
March 5, 2021 <- 05 Mar 2021
\text{The function is odd} <- the function is odd.
\text{infinitely many} <- infinitely many
6 \text{ feet} <- 72 \text{ inches}
10:15 <- 2:3
1:2:3 <- 2:4:6
\frac{1}{2} <- 0.5000
1/7 <- 0.142857
1/7 <- 0.14285714285714285
2/3 <- 0.666667
2/3 <- 0.6666667
10^{20} <- 1e20
\frac{x}{2} <- 0.5x
2(x+1) <- 2x+2
(x+1)(x+2) <- x^2+3x+2
\frac{1}{x+1} <- 1/(x+1)
x_1+x_2 <- x_2+x_1
x_{1} <- x_1
\log_{2}x <- \frac{\ln x}{\ln 2}
\log x <- \ln x
\{x | x > 2\} <- (2,\infty)
x \leq 3 <- (-\infty, 3]
x<-1 \text{ or } x>1 <- (-\infty,-1)\cup(1,\infty)
(1,\infty)\cup(-\infty,-1) <- (-\infty,-1)\cup(1,\infty)
x=1 \text{ or } x=2 <- 1,2
1,2 <- x=2,1
x=1,2 <- x = 2 \text{ or } 1
x=1, y=2 <- (1,2)
x=1, y=2 <- y=2, x=1
x=1,y=2 <- 1,2
(1,2),(3,4) <- (3,4),(1,2)
\{(1,2),(3,4)\} <- (1,2),(3,4)
2\sqrt{3}\text{ cm} <- \sqrt{12}
\$1{,}234.50 <- 1234.5
\$1,234.50 <- $1234.50
1,234.5 <- 1234.5
1.000 <- 1
1,000 <- 1000.0
-\frac{1}{2} <- \frac{-1}{2}
-\frac12 <- \frac{1}{-2}
\frac{-3}{4} <- -0.75
\text{-5} <- -5
5\text{th} <- 5th
5^{\text{th}} <- 5
3.0\times 10^8 \text{ m/s} <- 3e8 m/s
9.8 \text{ m/s}^2 <- 9.8 m/s^2
25\% <- \frac14
0.25 <- 25 percent
25 <- 25 percent
\textbf{(B)} <- \text{B}
B <- \text{Choice B}
B <- Option B
B <- B: 7
\infty <- infinity
\text{undefined} <- undefined
\text{DNE} <- DNE
\text{No} <- no
\text{True} <- true
\frac{\sqrt{2}}{2} <- \frac{1}{\sqrt 2}
\sqrt{\sqrt{16}} <- 2
\sqrt{2+\sqrt3} <- \frac{\sqrt6+\sqrt2}{2}
\sqrt{5+2\sqrt6} <- \sqrt2+\sqrt3
e^{i\pi} <- -1
i^2 <- -1
\frac{1+i}{\sqrt2} <- e^{i\pi/4}
30^\circ <- 30
45^{\circ} <- 45°
12! <- 479001600
[1,2] <- [1, 2]
[1,2] <- 1\le x\le 2
(0,1] <- 0<x\le1
\mathbb{R} <- (-\infty,\infty)
\text{all real numbers} <- all real numbers
0.1+0.2 <- 0.3
1e3 <- 1000
2e3 <- 2000
2e-3 <- 0.002
2e-3 <- 2 e - 3
\frac{3}{4} <- \frac34
2^{3^2} <- 512
-2^2 <- -4
(-2)^2 <- 4
4/3 <- 1\frac13
4/3 <- 1 \frac{1}{3}
4/3 <- 1+\frac13
4/3 <- 1\ 1/3
4/3 <- 1 1/3 cups
\begin{pmatrix}1&2\\3&4\end{pmatrix} <- \begin{bmatrix}1&2\\3&4\end{bmatrix}
\langle 1,2\rangle <- (1,2)
\frac{1}{2}(x+1) <- \frac{x+1}{2}
C <- C
C + x <- x + C
3\text{ hours }30\text{ minutes} <- 210 minutes
3.5 hours <- 3 hours 30 minutes
\$5 <- 5 dollars
\$5 <- 500 cents
12 <- 12.0
12 <- 1.2e1
12 <- 12 \text{ ways}
12 <- \text{12 ways}
12 <- 12\%
10^{-5} <- 0.00001
\frac{1}{10^{5}} <- 1e-5
0.00001 <- 1.0 \times 10^{-5}
1.5\times10^{3} <- 1500
1.5×10^3 <- 1.5*10^3
73 <- ***73***
73 <- _73_
73 <- "73"
73 <- '73'
73 <- \color{red}{73}
73 <- {\color{red} 73}
73 <- \mathbf{73}
73 <- 73 \checkmark
73 <- 73\qquad
73 <- 73\\
73 <- \text{ }73
73 <- \bf 73
73 <- [73]
73 <- (73)
"""


@pytest.mark.parametrize(("gold", "found"), pairs(RIGHT))
def test_equivalent_forms_are_correct(gold, found):
    assert verify_math(f"It is \\boxed{{{found}}}.", gold) == 1.0
