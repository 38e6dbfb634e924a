"""Renders what a camera of Meta-World sees, in one way for recording demonstrations and for evaluating policies.

A policy knows the pictures that it was trained on. Shadows take nine tenths of the time and are off in both.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

CAMERA = "corner2"
CAMERA_POSITION = (0.75, 0.075, 0.7)  # where LeRobot's environment puts this camera
BLANK_STD = 4.0  # grey levels; a rendered frame has 40 and more, one that was not rendered 0


def choose_backend() -> None:
    """Lets MuJoCo render without a display, unless the user chose otherwise; it reads the variable when it is imported."""
    os.environ.setdefault("MUJOCO_GL", "egl")


def import_simulator() -> None:
    """Imports Meta-World and MuJoCo, which looks for its renderer then.

    Raises:
        ModuleNotFoundError: if they are not installed.
        ValueError: if the machine cannot render like this, with what to try.
    """
    try:
        import metaworld  # noqa: F401
        import mujoco  # noqa: F401
    except ModuleNotFoundError:
        raise
    except (ImportError, AttributeError, RuntimeError) as error:  # PyOpenGL: 'NoneType' object has no attribute …
        raise ValueError(f"MuJoCo cannot render here ({error}). {_what_to_try()}") from None


def _what_to_try() -> str:
    return (
        f"MUJOCO_GL is {os.environ.get('MUJOCO_GL')!r}: try the other of egl and osmesa; on Debian they need the packages "
        "libegl1 libgl1-mesa-dri libgles2 libosmesa6"
    )


def check_not_blank(image: np.ndarray) -> None:
    """Refuses a picture (H, W, 3) that shows nothing.

    Raises:
        RuntimeError: with what to try, because a renderer without a working context says nothing itself.
    """
    if image.std() < BLANK_STD:
        raise RuntimeError(
            f"the renderer gave a blank image (standard deviation {image.std():.1f} grey levels). {_what_to_try()}"
        )


def settle(env: Any) -> np.ndarray:
    """Gives the observation after a reset of Meta-World's ``env``, with the scene as it is now.

    The reset moves goals and objects in the model without computing where that puts them, so that the first picture
    would show the layout of the draw before.
    """
    import mujoco

    mujoco.mj_kinematics(env.model, env.data)
    return env._get_obs()


class Camera:
    """Renders a Meta-World scene; make it right after the environment, before anything else has rendered it.

    Args:
        env: Meta-World's environment.
        height, width: of the pictures.
    """

    def __init__(self, env: Any, height: int, width: int) -> None:
        import mujoco

        # MuJoCo allocates the shadow map (4096 × 4096 in these models) with the context: switch it off before.
        env.model.camera(CAMERA).pos = CAMERA_POSITION
        env.model.vis.quality.shadowsize = 0
        env.model.vis.quality.offsamples = 0
        self._data = env.data
        # MuJoCo's own renderer makes its GL context current before each frame. gymnasium's does not, and shows wrong
        # or black images as soon as a process holds two of them.
        self._renderer = mujoco.Renderer(env.model, height=height, width=width)
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0

    def image(self) -> np.ndarray:
        """Renders what the camera sees now, (H, W, 3) uint8.

        Raises:
            RuntimeError: if the picture is blank.
        """
        self._renderer.update_scene(self._data, camera=CAMERA)
        image = np.ascontiguousarray(np.flip(self._renderer.render(), (0, 1)))  # the camera hangs upside down
        check_not_blank(image)
        return image

    def close(self) -> None:
        """Frees the GL context; one that is collected later turns the next picture of another one black."""
        self._renderer.close()
