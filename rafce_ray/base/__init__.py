"""What everything stands on: errors, words for people, hardware, storage, names and the table of figures."""
