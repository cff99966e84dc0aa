"""A browser for the tests of the site: `python -m docs.browser` finds or installs one.

Debian's package where apt-get can install it, else Playwright's own download."""
import os, shutil, subprocess, sys
from pathlib import Path
from playwright.sync_api import sync_playwright

NAMES = 'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'

def find():
    "The path of an installed Chromium or Chrome, or of Playwright's own; None without"
    installed = [path for name in NAMES if (path := shutil.which(name))]
    with sync_playwright() as p: downloaded = p.chromium.executable_path
    if Path(downloaded).exists(): installed.append(downloaded)
    return installed[0] if installed else None

def commands():
    "What installs one, step by step: by apt-get, and by Playwright"
    ways = []
    is_root = os.geteuid() == 0
    if shutil.which('apt-get') and (is_root or shutil.which('sudo')):
        apt = ['apt-get'] if is_root else ['sudo', 'apt-get']
        package = ['install', '-y', '--no-install-recommends', 'chromium']
        ways.append([[*apt, 'update'], [*apt, *package]])
    ways.append([[sys.executable, '-m', 'playwright', 'install', 'chromium']])
    return ways

def install():
    "Try one way after the other; returns the browser's path, None if none worked"
    for steps in commands():
        for step in steps:
            print('+', *step, flush=True)
            if subprocess.run(step).returncode: break
        if find(): break
    return find()

if __name__ == '__main__':
    path = find() or install()
    if not path: sys.exit('no browser could be installed: install chromium by hand')
    print(f'The browser of the tests: {path}')
