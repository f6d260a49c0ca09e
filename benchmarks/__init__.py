"""Measurements: every acceptance line of the project is a row in ``results/`` written by a script here."""
