package settings

import (
	"flag"
	"os"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite golden files")

// TestHelp: the text of `settings --help` is what scripts and people know, and
// names all settings of the product.
func TestHelp(t *testing.T) {
	const golden = "testdata/help.txt"
	if *update {
		if err := os.WriteFile(golden, []byte(Help()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if Help() != string(want) {
		t.Errorf("got\n%s", Help())
	}
	for name := range strings.FieldsSeq(`reuse-build-failures reuse-build-timeouts keep-builds-running timeout max-silent-time
		max-log-size max-cpu-hours-per-month default-cpu min-cpu max-cpu min-mem max-mem max-build-restarts substituters
		trusted-public-keys always-substitute never-substitute caches access-tokens max-storage max-running-builds
		max-connections allow-addresses signing-key-for-builds trusted-accounts offer-signed share-results reuse-results public-cache
		oidc-subjects settings-from-ssh-env settings-from-drv-env default-permissions`) {
		if _, ok := Lookup(name); !ok {
			t.Errorf("no setting %s", name)
		}
	}
}
