"""Frozen codebooks for N(0, 1), made by `python -m turbocache.codebooks.scalar`."""

# Positive half of the Lloyd-Max levels by bits; the other half mirrors it.
LLOYD_MAX: dict[int, tuple[float, ...]] = {
    1: (0.797884560803,),
    2: (
        0.452780034636,
        1.510417608499,
    ),
    3: (
        0.245094178944,
        0.756005281206,
        1.343909278505,
        2.151945704537,
    ),
    4: (
        0.128395029851,
        0.388048299490,
        0.656759118532,
        0.942340456487,
        1.256231197347,
        1.618046386022,
        2.069017226531,
        2.732589570995,
    ),
}

# Spacing of the best equally spaced levels by bits.
UNIFORM_STEP: dict[int, float] = {
    1: 1.595769126660,
    2: 0.995686683816,
    3: 0.586019427853,
    4: 0.335200598770,
}
