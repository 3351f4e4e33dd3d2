"""The ledger of claims: every benefit that is claimed for BatchNorm, put to the test.

`python -m bn_lightning.claims` measures the claims of ledger/ and judges each by its rule.

design.py             what a claim is: sentence, arms, settings, measure, conditions
registry.py           finds the claims: one file each in ledger/
verdict.py            the rule: from one number for each seed and arm to a verdict
verdict_text.py       effects, bounds and outcomes in words
measured_network.py   what a measure sees: a network, before or after training, and its data
probes.py             measures that several claims share
settings.py           settings that several claims share
claim_training.py     composes the trainings of a claim, and trains them as stacks
result_table.py       trials.csv: what has been measured, and under which versions, data and options
claim_figures.py      the figure of a claim
claim_overview.py     the overview of all claims
interval_rows.py      rows of text with an interval below each, for both
claim_page.py         the page, and claims.md
run_claims.py         from names and options to the files of the ledger
__main__.py           the command

A claim is added by one file in ledger/ that calls `register_claim`.
"""
