"""Pure estimates of what can be trusted: labels, teachers, loss terms, and which rows are worth a question.

Functions of tensors or arrays, which know nothing of Lightning; import each from its file.
"""
