"""What is told of runs and of data once the figures are there: tables, an HTML page, experiment trackers.

Reading order: `charts`, `style`, `page`, `sweep`, `evaluation`, `findings`, `trackers`.
"""
