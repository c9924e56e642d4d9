"""Operators: tensors in, tensors out; one operator, one file. Knows neither transformers nor PEFT.

An operator is an autograd function, a plain torch reference that runs on any device, and where there is one a faster
function of the device's backend (see `backends`).
"""
