# SPDX-License-Identifier: Apache-2.0
"""`python -m sparsebwd.reproduce`: the tables and the figure of Ye et al. (2019), each from one command.

A sweep is a list of runs of the training command, each in a directory named from its settings. What is done is kept,
what is missing is run, by as many processes as share the output folder.
"""
