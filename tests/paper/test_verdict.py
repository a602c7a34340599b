"""The sentence that says how much of the gap to BN PN closes, from the numbers alone."""

import pytest

from proxynorm.paper.compare import Sample, gap_sentence


def sentence(bn, plain, proxied):
    return gap_sentence(Sample(bn), Sample(plain), Sample(proxied), "LN")


LN = (88.0, 88.1, 87.9)
BN = (91.0, 91.1, 90.9)


@pytest.mark.parametrize(
    "bn, plain, proxied, words",
    [
        (BN, LN, (90.0, 90.1, 89.9), "PN closes 2.00 of the 3.00 points between LN and BN; "
         "LN+PN and BN then differ by -1.00 (95 % interval -1.23 … -0.77, n = 3)."),
        (BN, LN, (90.9, 91.0, 90.8), "PN closes 2.90 of the 3.00 points between LN and BN; "
         "LN+PN and BN then differ by -0.10 (95 % interval -0.33 … +0.13, n = 3)."),
        (BN, LN, (92.0, 92.1, 91.9), "PN closes all of the 3.00 points between LN and BN; "
         "LN+PN and BN then differ by +1.00 (95 % interval +0.77 … +1.23, n = 3)."),
        (BN, LN, (87.0, 87.1, 86.9), "PN widens the 3.00 points between LN and BN by 1.00 "
         "(n = 3)."),
        (BN, LN, (88.1, 88.3, 87.8), "LN is 3.00 points behind BN; PN adds +0.07, which is not "
         "significant (n = 3)."),
        (BN, (90.0, 92.0, 90.5), LN, "The 0.17 points between LN and BN are not significant; "
         "PN adds -2.83 (n = 3)."),
        (BN, (90.0, 92.0, 90.5), (88.0, 95.0, 91.0), "The 0.17 points between LN and BN are not "
         "significant; PN adds +0.50, which is not significant either (n = 3)."),
        (BN, LN, (90.0,), "PN closes 2.00 of the 3.00 points between LN and BN; "
         "LN+PN and BN then differ by -1.00 (n = 1–3, untested)."),
        (LN, BN, BN, "LN is not behind BN here (+3.00 points): there is no gap for PN to close "
         "(n = 3)."),
        ((91.0,), (88.0,), (90.0,), "PN closes 2.00 of the 3.00 points between LN and BN; "
         "LN+PN and BN then differ by -1.00 (one seed each, spread unknown)."),
        (BN, LN[:2], (90.0, 90.1), "PN closes 2.00 of the 2.95 points between LN and BN; "
         "LN+PN and BN then differ by -0.95 (95 % interval -1.20 … -0.70, n = 2–3)."),
    ],
)  # fmt: skip
def test_the_verdict_is_computed_from_the_samples(bn, plain, proxied, words):
    assert sentence(bn, plain, proxied) == words
