"""What ``galley bench`` does: loads, timings and their figures. Nothing else in Galley imports this."""
