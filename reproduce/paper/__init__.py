"""The page of claims: what arXiv 2602.20904 reports, and what evaluations show here."""
