# SPDX-License-Identifier: Apache-2.0
"""Networks of others: converted, trained and reverted, one by one. ``make zoo`` runs all and writes the table of
docs/compatibility.md; the ordinary tests run those of the package's own benchmark."""
