"The site (`docs.build`) and the README (`docs.readme`), from the notebooks"
import os

repo = os.environ.get('GITHUB_REPOSITORY', '')  # owner/name; GitHub Actions sets it
base_url = 'https://{}.github.io/{}/'.format(*repo.split('/')) if repo else ''
