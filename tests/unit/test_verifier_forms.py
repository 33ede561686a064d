"""Answers as models write them, one pair per line: correct notations, and incorrect answers close to them."""

from __future__ import annotations

import math
from random import Random

import pytest
from answer_pairs import pairs

from megatron_g2rl.rewards import verify_math
from megatron_g2rl.rewards.verifier import _same_answer

RIGHT = r"""
\frac{1}{2} <- {1 \over 2}
\frac{1}{2} <- 1 \over 2
\frac{1}{2} <- 1⁄2
\frac{1}{2} <- \mathbb{P}(A) = \frac12
\frac{1}{2} <- P(A|B) = \frac12
7 <- \huge 7
7 <- \large{7}
7 <- \Large 7
7 <- \normalsize 7
7 <- **Answer:** 7
7 <- 7\text{.}
7 <- 7\text{ sq. units}
7 <- f(g(2)) = 7
7 <- \text{The answer is } 7
7 <- \text{The final answer is } 7.
7 <- 7 \, \blacksquare
7 <- 7 \quad \text{cm}
60 \text{ km/h} <- 60\,\frac{\text{km}}{\text{h}}
3, -3 <- x \in \{-3,3\}
(-\infty,-1)\cup(2,\infty) <- (-\infty,-1)\bigcup(2,\infty)
(-\infty,-1)\cup(2,\infty) <- \{x \in \mathbb{R} \mid x < -1 \text{ or } x > 2\}
(-\infty,-1)\cup(2,\infty) <- \mathbb{R} - [-1,2]
(-2,3] <- x > -2 \text{ and } x \le 3
(-2,3] <- ]-2, 3]
\$18.90 <- US\$18.90
\$18.90 <- USD 18.90
5 <- \pounds5
5 <- \euro 5
12345 <- 12{\,}345
\begin{pmatrix}1&2\\3&4\end{pmatrix} <- \begin{bmatrix} 1 & 2 \\[2pt] 3 & 4 \end{bmatrix}
\begin{pmatrix} \frac{1}{2} \\ 2 \end{pmatrix} <- \begin{pmatrix} \dfrac{1}{2} \\[6pt] 2 \end{pmatrix}
1011_2 <- 1011_{(2)}
\text{(A)} <- (a)
3:45 <- 3{:}45
0.\overline{27} <- 0.272727\ldots
\frac{3}{11} <- 0.(27)
\frac{3}{11} <- 0.\dot{2}\dot{7}
\sqrt[3]{2} <- ∛2
3+4i <- 3+4\mathrm{i}
5 <- \text{five}
five <- 5
-5 <- {-}5
-\frac{3}{4} <- −3⁄4
\binom{5}{2} <- {5 \choose 2}
\binom{5}{2} <- \frac{5!}{2!3!}
e^2 <- \text{e}^2
3:4 <- 3 to 4
3:4 <- 3\text{ to }4
3:4 <- 3{:}4
1, 2, 3 <- n \in \{1,2,3\}
1, 2, 3 <- [1, 2, 3]
(1,2), (3,4) <- (x,y) \in \{(1,2),(3,4)\}
(-1, 2) <- A(-1, 2)
10 <- 10 \textdegree
10 <- ten
\frac{3}{4} <- \sfrac{3}{4}
\frac{3}{4} <- \nicefrac{3}{4}
12 <- 12\text{ m/s}
12 <- 12 \frac{\text{m}}{\text{s}}
12 <- 12 \text{ Hz}
12 <- twelve
12 <- Twelve
12 <- \text{twelve}
12 <- \phantom{0}12
12 <- 12 \tag{1}
12 <- \emph{12}
12 <- 12\space
12 <- 12 \enspace
12 <- 12 ✓
12 <- 12 ✅
12 <- 12{}
12 <- {}12
12 <- 12\null
12 <- x^*=12
12 <- x^{*} = 12
12 <- E[X] = 12
12 <- \mathbb{E}[X] = 12
12 <- \text{Ans: } 12
12 <- \therefore 12
12 <- = 12
12 <- \implies 12
12 <- \Rightarrow x = 12
1.2 <- 1{.}2
[0,1) <- [0,1[
[0,1) <- \{ x \in \mathbb{R} : 0 \le x < 1 \}
[0,1) <- x \ge 0 \text{ and } x < 1
[0,1) <- x<1 \land x \ge 0
(-\infty,0)\cup(0,\infty) <- \mathbb{R}-\{0\}
(-\infty,0)\cup(0,\infty) <- \mathbb{R} \backslash \{0\}
(-\infty,0)\cup(0,\infty) <- x\in\mathbb{R}, x\neq 0
(-\infty,0)\cup(0,\infty) <- \{x\in\mathbb{R}: x\ne0\}
e^{-x^2} <- \mathrm{e}^{-x^{2}}
\text{B} <- \text{The correct answer is (B)}
1,2,3,\ldots <- 1,2,3,\dots
1,2,3,\ldots <- 1, 2, 3, \cdots
0 <- zero
0 <- \text{zero}
1 <- 0.999...
1 <- one
x = 2 <- x \in \{2\}
x=2, y=3 <- (x,y)=(2,3)
x=2, y=3 <- \begin{cases}x=2\\y=3\end{cases}
x=2, y=3 <- \begin{aligned}x&=2\\y&=3\end{aligned}
7 <- \bm{7}
[0,1) <- 0 \leq t < 1
-2 <- \text{-}2
\text{(c)} <- C
0.1 <- 1 \over 10
\frac{16}{15} <- 1.0(6)
\frac{1}{7} <- 0.142857142857...
"""

WRONG = r"""
7 <- 7...
7 \text{ cm} <- 7\%
45^\circ <- 45\%
July 4, 1776 <- July 4, 1777
0.27 <- 0.27...
1, 2, 3 <- 1,2,3,...
1,2,3,\ldots <- 1,2,3
12 <- 12 January
12 <- \log x = 12
(2,-2) <- y=2, x=-2
1,2,3,\ldots <- 1, 3, 2, ...
x=2, y=3 <- 3,2
x=2, y=3 <- \{2,3\}
17 January 2020 <- 17 January 2021
7 <- 7, 7
7 <- \text{seven or eight}
7 <- \text{seventeen}
7 <- \text{seventh}
7 <- \text{one seventh}
7 <- 7\text{ pairs}
7 <- 7\text{ or more}
7 <- 7k
7 <- \frac{7}{}
7 <- 7^{}
7 <- 1...7
7 <- 1, 2, \ldots, 7
7 <- \not= 7
7 <- 7 \text{ to } 8
7 <- -x = 7
7 <- x^2 = 7
7 <- 2x = 7
12 <- 12 R 3
12 <- 12 \text{ remainder } 3
12 <- 12 \bmod 5
12 <- 1{.}2
12 <- \text{one two}
12 <- \text{twelve thousand}
12 <- x = 13 = 12
12 <- y = x = 13, z = 12
12 <- a = 12, b = 13
12 <- \text{Area} = 13, \text{perimeter} = 12
12 <- \begin{cases}x=12\\y=13\end{cases}
12 <- 12\phantom{0}0
5 <- \text{twenty-five}
5 <- \text{fifty-five}
5 <- \text{five and a half}
5 <- \text{five hundred}
3, -3 <- 3, -3, 0
3, -3 <- x \in \{3\}
3, -3 <- x \in [-3, 3]
3, -3 <- x \notin \{3, -3\}
3, -3 <- x=-3, y=3
1, 2, 3 <- (3, 2, 1)
1, 2, 3 <- [1, 2, 4]
1, 2 <- [1, 2]
[1, 2, 3] <- [3, 2, 1]
1, 2, 3 <- 1, 2, ...
1, ..., 9 <- 1, 9
(1,2,3) <- x=1, y=3, z=2
(2,-2) <- B(2,2)
(2,-2) <- \{2,-2\}
(2,-2) <- x=-2, y=2
x=2, y=3 <- x=3, y=2
x=2, y=3 <- (x,y)=(3,2)
x=2, y=3 <- (y,x)=(2,3)
[0,1) <- ]0,1[
[0,1) <- ]0,1]
[0,1) <- x \ge 0 \text{ or } x < 1
(-\infty,0)\cup(0,\infty) <- x \in \mathbb{R}, x \ne 1
(-\infty,0)\cup(0,\infty) <- x \in \mathbb{Z}, x \ne 0
(-\infty,0)\cup(0,\infty) <- \mathbb{Z} - \{0\}
(-\infty,-1)\cup(2,\infty) <- x<-1 \text{ and } x>2
(-\infty,-1)\cup(2,\infty) <- \{x \in \mathbb{Q} \mid x < -1 \text{ or } x > 2\}
\mathbb{R} <- x \in \mathbb{Q}
60 \text{ km/h} <- 60\,\frac{\text{m}}{\text{s}}
60 \text{ km/h} <- 60\,\frac{\text{km}}{\text{s}}
5 \text{ kPa} <- 5 \text{ Pa}
400 \text{ square feet} <- 400 \text{ cu. ft.}
\$18.90 <- €18.90
£5 <- \euro 5
25\% <- 25 \text{ cm}
0.\overline{27} <- 0.\overline{72}
0.\overline{27} <- 0.27...
\frac{3}{11} <- 0.(72)
\frac{3}{11} <- 0.\dot{7}\dot{2}
0.27 <- 0.\overline{27}
\frac{1}{6} <- 0.1666
\frac{1}{6} <- 0.16...
1 <- 0.\overline{8}
1 <- 0.99...9
\sqrt{2} <- 1.41...
\sqrt{2} <- 1.414141...
\pi <- 3.1415...
\frac{3}{4} <- 3 \over 5
\binom{5}{2} <- {5 \choose 1}
\binom{5}{2} <- \frac{5!}{2!2!}
3! <- 2!3
3+4i <- 3-4\mathrm{i}
e^2 <- 2\text{e}
\sqrt[3]{2} <- ∛3
\text{(A)} <- (b)
\text{(A)} <- A. B
\text{(c)} <- (d)
\text{(c)} <- D
A <- a
\text{B} <- (C) B
\text{B} <- \text{The correct answer is (B) or (C)}
1011_2 <- 1011_{\text{three}}
1011_2 <- 1011_{(10)}
3:4 <- 4 to 3
3:4 <- 3 to 5
July 4, 1776 <- July 5, 1776
May 5, 1000 <- May 5, 100
\text{ellipse} <- an eclipse
\text{Player A} <- a player
P(A|B) = \frac12 <- P(B|A) = \frac12
\frac{1}{2} <- P(A) = \frac12, P(B) = \frac13
f(x) = x^2 <- f(x) = x^3
\begin{pmatrix}1&2\\3&4\end{pmatrix} <- \begin{bmatrix}1&2\\[2pt]3&5\end{bmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} <- \begin{pmatrix}1&2\\3&4\end{pmatrix}^{-1}
\begin{pmatrix}1&2\\3&4\end{pmatrix} <- 2\begin{pmatrix}1&2\\3&4\end{pmatrix}
\begin{cases} x & x > 0 \\ -x & x \le 0 \end{cases} <- \begin{cases} x & x > 0 \\ x & x \le 0 \end{cases}
2.5 \times 10^{-4} <- 2.5 x 10^{4}
10^{1000000}+1 <- 10^{1000000}
2^{1000000007} <- 2^{1000000008}
"""


@pytest.mark.parametrize(("gold", "found"), pairs(RIGHT))
def test_another_notation_of_the_reference_is_correct(gold, found):
    assert verify_math(f"It is \\boxed{{{found}}}.", gold) == 1.0


@pytest.mark.parametrize(("gold", "found"), pairs(WRONG))
def test_an_answer_close_to_the_reference_is_incorrect(gold, found):
    assert verify_math(f"It is \\boxed{{{found}}}.", gold) == 0.0


def test_verdicts_do_not_depend_on_their_order():
    every = [(pair, 1.0) for pair in pairs(RIGHT)] + [(pair, 0.0) for pair in pairs(WRONG)]
    for seed in range(2):
        _same_answer.cache_clear()
        for (gold, found), verdict in Random(seed).sample(every, len(every)):
            assert verify_math(f"\\boxed{{{found}}}", gold) == verdict, (gold, found)


def test_work_is_counted_completely_regardless_of_earlier_computations():
    terms = 8500
    costly = "+".join(["e"] * terms)
    decimal = f"\\boxed{{{math.e * terms:.4f}}}"
    assert verify_math(decimal, "+".join(["e"] * (terms // 10)) + f"+{terms - terms // 10}e") == 1.0
    assert verify_math(decimal, costly) == 0.0  # too much work
    _same_answer.cache_clear()
    assert verify_math("\\boxed{x \\ge 1}", f"[{costly}, \\infty)") == 0.0  # computes its value
    assert verify_math(decimal, costly) == 0.0
