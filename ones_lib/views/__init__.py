"""What people look at: figures of result tables, widgets to explore experts, and measurements of speed.

May import every other package of the library; none of them imports this one.
"""
