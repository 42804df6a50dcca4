"""Versions of bundles in one folder, and which is live and why: add, promote through gates, roll back."""
