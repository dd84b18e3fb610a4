"""Routers set from text: sums over router inputs, the solve, and the choice of a temperature."""
