"""A soak: crowds of consumers and sources of every kind, random faults, and every promise checked at every consumer all the time.

`world` holds what is shared and what is counted, `openings` what was opened and yielded, `sources` and `brokers` what is opened,
`wishes` what a consumer asks for, `checker` what it may receive, `consumers`, `ackers` and `triggered` who receives it, `quiet`
what must be left when nobody is there, `rounds` how a round goes, and `play` how one follows the other.
``python -m tests.soak --minutes N`` runs it.
"""
