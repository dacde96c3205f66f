"""How a draft artifact is made: data, a student, divergences, training, measures. See README.md beside the method."""
