"""`python -m llava_sp.train --config FILE.yaml [--key value ...]`: see run.py."""

from llava_sp.train.run import main

if __name__ == "__main__":
    main()
