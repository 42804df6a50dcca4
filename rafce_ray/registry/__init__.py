"""Versions of bundles in one folder, which of them is live and why: what is served, promoted past gates, and rolled
back.
"""
