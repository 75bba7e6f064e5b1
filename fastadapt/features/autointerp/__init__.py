"""Judges: what a unit fires on, put into words; whether the words hold; what kind of unit it is."""
