"""What is told of runs and of data once the figures are there: tables, an HTML page, experiment trackers."""
