"""Speed measured on the machine at hand: kernels beside torch's, models beside their dense twins.

``clock`` times contenders in turn, ``limits`` asks the machine what it could do at best,
``kernels`` multiplies matrices, ``layer`` and ``model`` decode. `distaya bench` prints it, bench/
writes it into README.
"""
