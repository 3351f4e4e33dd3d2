"""The sweeper in a program that has nothing to do with BatchNorm: gradient descent on a valley.

python main.py lr=0.1                                  # one run
python main.py -m                                      # the sweep of conf/config.yaml
python main.py -m hydra.sweeper.n_jobs=2               # the same by two workers; again: goes on
python main.py -m hydra/sweeper/sampler=random hydra.sweeper.study_name=random
"""

import hydra
from hydra_plugins.bn_optuna import register
from omegaconf import DictConfig

register()  # Hydra does not find the plugin by itself where bn_lightning is an editable install


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(config: DictConfig) -> dict[str, float | bool]:
    """Descends f(x, y) = x^2 + 20 y^2 from (10, 1); a run that leaves the valley has diverged."""
    position, velocity = [10.0, 1.0], [0.0, 0.0]
    slopes = (2.0, 40.0)
    for _ in range(config.steps):
        for i, slope in enumerate(slopes):
            velocity[i] = config.momentum * velocity[i] - config.lr * slope * position[i]
            position[i] += velocity[i]
        if abs(position[0]) + abs(position[1]) > 1e6:
            # A result, with the score of not having moved: never a gap in the map.
            return {"height": 120.0, "diverged": True}
    return {"height": position[0] ** 2 + 20 * position[1] ** 2, "diverged": False}


if __name__ == "__main__":
    main()
