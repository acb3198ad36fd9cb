"""Modules of an encoder that computes with integers alone (I-BERT, Kim et al. 2021).

Leaves (`linear`, `norm`, `activation`, `embedding`) hold integer buffers and know from which grid to which they lead;
composites (`block`, `chain`, `embedding`) call them in order. docs/math.md gives each its equation and its bounds.
"""
