"""The referee: it owns the clock, the data and the score of a run; train.py owns the rest."""
