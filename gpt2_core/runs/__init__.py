"""A run on disk and what it does when: its folder, its log, trackers, and what is due after a step."""
