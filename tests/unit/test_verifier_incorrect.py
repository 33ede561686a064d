"""Incorrect answers of every kind for a reference, one pair per line, and answers that cannot be compared."""

from __future__ import annotations

import json

import pytest
from answer_pairs import pairs

from megatron_g2rl.rewards import verify_math

WRONG = r"""
60^\circ <- \frac{\pi}{3} \text{ radians}
\frac{1}{3} <- 0.33
0.3 <- 0.30000000000000004
\pi <- 3.14
\pi <- 22/7
1+\frac{1}{2^{98}} <- 1+\frac{1}{2^{99}}
\frac{1}{20!} <- \frac{1}{21!}
-1/3^{50} <- 1/3^{50}
0.00000003 <- 0.00000005
3+e^{-1000} <- 3
\sqrt2 + 10^{-300} <- \sqrt2
e^{-200} <- 0
0 <- e^{-200}
10^{-7} <- 0
1,234 <- 1
12 <- 1 2
12 <- 2
4/3 <- 2 2/3
2 <- 1 2
1234 <- 1 234
5 <- 5 or 6
5 <- 5, 6
5 <- x=5 or x=6
5 <- \{5,6\}
5 <- 5, 5
42 <- (42, 43)
5\text{ cm} <- 5\text{ m}
5 \text{ cm}^2 <- 5 \text{ cm}
1 m <- 1 cm
50\% <- 0.05
0.5 <- 0.5\%
0.5 <- 5\%
(1,2) <- (2,1)
(1,2) <- [1,2]
[1,2) <- (1,2]
(1,2) <- \{1,2\}
\{1,2\} <- \{1,2,3\}
|x| <- x
\sqrt{x^2} <- x
|x-10| <- 10-x
x+y <- a+b
\sin x <- \sin y
x > 2 <- y > 2
x>2 <- x\ge 2
y=2x+1 <- y=2x-1
A <- B
A <- (A) or (B)
A <- (A) (B)
A <- A, B
E <- 2.718281828
e <- E
0 <- x^2-4x=0
0 <- 1+1 = 0
42 <- 42 is not right, 43
42 <- not 42
42 <- 42 or more
42 <- at least 42
3 <- 3 million
3 <- 3 halves
3 <- 3 dozen
3 <- 3 squared
2021 <- \pm 2021
-2021 <- \pm 2021
8:34 <- 4:17
12:30 <- 12:31
8:34 am <- 8:34 pm
5 <- x
x <- 5
\infty <- -\infty
\frac{1}{2} <- \frac{1}{2}x
2x <- 2
5 <- 5 \text{ (or 6)}
5 <- \text{The answer is 5, or 6}
5 <- print(5)
5 <- 5 if True else 6
5 <- int("5")
5 <- max(5, 6)
5 <- \text{5 or 6}
5 <- 5/6
5 <- 5; 6
5 <- 5\ 6
5 <- 5 \quad 6
5 <- 5 \\ 6
5 <- 5 | 6
5 <- \frac{5}{}
5 <- 5.0.0
5 <- \text{5}6
5 <- 5_6
5 <- 5^{}
5 <- \underbrace{5}_{6}
5 <- 5 = 6
6 <- 5 = 6
5 <- 5 \ne 6
5 <- x = 5, y = 6
5 <- x \in \{5, 6\}
5 <- 4 < x < 6
5 <- 5.0000000000000000000000001
1/3 <- 0.333333333333333333333333333334
\text{Evelyn} <- Evelyn or Navin
\text{east} <- west
0 <- \log_0 5
x <- \frac{d}{dx}x^2
100 <- [0,100]
(1,2) <- 1 \text{ or } 2
n! <- 1e-400
A <- A. B
(1+2)\cdot 3 \text{ cm} <- 1+2\cdot 3\text{ cm}
3/5/2021 <- 3/5/2022
3/5/2021 <- 6/10/2021
March 5, 2021 <- March 6, 2021
\text{convex} <- concave
1:2:3 <- 1:2:4
2:30 <- 2.5
1/7 <- 0.142858
2/3 <- 0.666666
\frac{1}{x+1} <- 1/x+1
\sqrt{x+1} <- \sqrt x+1
-x <- x
a^2+b^2 <- (a+b)^2
x=1, y=2 <- x=2, y=1
a=1 <- b=1
(1,2),(3,4) <- (2,1),(3,4)
(1,2) <- (1,2),(3,4)
9.8 \text{ m/s}^2 <- 9.8 m/s
\text{True} <- false
\text{Yes} <- \text{No}
\sqrt{5+2\sqrt6} <- \sqrt2+\sqrt3+10^{-40}
30^\circ <- \frac{\pi}{6}
\frac{\pi}{6} <- 30^\circ
(0,1] <- 0<x<1
\frac{13}{4} <- \frac134
2^{3}^2 <- 64
-2^2 <- 4
4/3 <- 1-1/3
1/3 <- 1 1/3
\begin{pmatrix}1&2\\3&4\end{pmatrix} <- \begin{bmatrix}1&3\\2&4\end{bmatrix}
x^2 + C <- x^2+c
\$5 <- €5
1.5 \times 10^{-3} <- 1.5 \times 10^{3}
"""


@pytest.mark.parametrize(("gold", "found"), pairs(WRONG))
def test_similar_but_different_answers_are_incorrect(gold, found):
    assert verify_math(f"It is \\boxed{{{found}}}.", gold) == 0.0


@pytest.mark.parametrize(
    "found", ["n" * 19_000, "\\pm1," * 3000 + "1", "x!+" * 1500 + "1", "2^" * 3000 + "2", "1e-400"]
)
def test_expensive_answers_are_rejected_without_delay(found):
    assert verify_math(f"\\boxed{{{found}}}", "n!") == 0.0


def test_labeled_cases_of_earlier_false_positives_are_verified_as_labeled(data_folder):
    path = data_folder / "verifier_more.jsonl"
    cases = [json.loads(line) for line in path.read_text().splitlines()]
    assert [c["id"] for c in cases if (verify_math(c["output"], c["gold"]) == 1.0) is not c["expected"]] == []


def test_an_error_in_the_comparison_makes_the_answer_incorrect_and_is_logged(monkeypatch, caplog):
    def fail(*_):
        raise KeyError("tuple")

    monkeypatch.setattr("megatron_g2rl.rewards.verifier._same_answer", fail)
    assert verify_math("\\boxed{5}", "5") == 0.0
    assert "failed: please report this" in caplog.text


@pytest.mark.parametrize(("gold", "found"), [("-0.100001", "-\\frac{100001}{1000001}"), ("100001/1000001", "0.100001")])
def test_a_decimal_too_short_to_determine_a_fraction_is_incorrect(gold, found):
    assert verify_math(f"\\boxed{{{found}}}", gold) == 0.0
