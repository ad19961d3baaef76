"""linen modules and pure functions of parameters and images; see build.py for the way in."""
