"""Generated data, tokenizer, configuration and evaluation of the small checkpoint that the package carries.

A seed enters, files and figures leave; training itself is left to `videollama3 train` and the recipes.
"""
