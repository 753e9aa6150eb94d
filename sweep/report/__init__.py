"""Scores as people read them: statistics, a trial's report, index pages, plots, and the published tree."""
