"""Directions in closed form, with their controls; which of many to take."""
