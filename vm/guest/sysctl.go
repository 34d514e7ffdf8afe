package guest

import (
	"fmt"
	"os"
	"path/filepath"
)

// sysctls are the kernel's limits that NixOS sets for the whole machine, and
// with it for builders: some of their tests need more than a kernel's defaults.
var sysctls = []struct{ name, value string }{
	{"fs/inotify/max_user_instances", "524288"},
	{"fs/inotify/max_user_watches", "524288"},
	{"vm/max_map_count", "1048576"},
}

func setSysctls() error {
	for _, s := range sysctls {
		if err := os.WriteFile(filepath.Join("/proc/sys", s.name), []byte(s.value), 0); err != nil {
			return fmt.Errorf("set %s: %w", s.name, err)
		}
	}
	return nil
}
