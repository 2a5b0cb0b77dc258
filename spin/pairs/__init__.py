"""Pairs on disk and in packed rows."""
