"""What a source net learns beside its classes, so that it can adapt by it at test time: losses with heads of their own.

Training (:class:`lightning_tta.SourceClassifier`, ``auxiliary=``) and test time (the methods) share these files.
"""
