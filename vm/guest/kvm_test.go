package guest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A device that is not KVM's, or none, makes no machine, and says why.
func TestMakeVMRefused(t *testing.T) {
	for device, want := range map[string]string{
		"/dev/null":                           "not 12",
		filepath.Join(t.TempDir(), "nothing"): "no such file",
	} {
		if err := makeVM(device); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", device, err, want)
		}
	}
}

// Modules that do not load keep no guest from booting, and only guests that have
// the folder are asked for more.
func TestLoadKVM(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "modules")
	if wanted, err := loadKVM(dir); wanted || err != nil {
		t.Errorf("without a folder: %v, %v", wanted, err)
	}
	must(t, os.Mkdir(dir, 0o755), os.WriteFile(filepath.Join(dir, "000-kvm.ko"), []byte("no module"), 0o644))
	if wanted, err := loadKVM(dir); !wanted || err != nil {
		t.Errorf("with a module that does not load: %v, %v", wanted, err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the modules are left in memory: %v", err)
	}
}
