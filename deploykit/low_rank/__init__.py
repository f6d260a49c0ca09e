"""Layers as chains of smaller ones: decompositions, tables of what they lose and cost, which to take, the fit."""
