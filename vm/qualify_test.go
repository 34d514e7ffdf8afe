package vm

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

func itoa(i int) string { return strconv.Itoa(i) }

func TestParseQEMUVersion(t *testing.T) {
	for _, tt := range []struct {
		text, version string
		major         int
	}{
		{"QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright", "7.2.22", 7},
		{"QEMU emulator version 10.0.2\n", "10.0.2", 10},
		{"QEMU emulator version \n", "", 0},
		{"QEMU emulator version new\n", "", 0},
		{"bash: not found", "", 0},
	} {
		version, major, err := parseQEMUVersion(tt.text)
		if version != tt.version || major != tt.major || (err == nil) != (tt.major > 0) {
			t.Errorf("%q: %q, %d, %v", tt.text, version, major, err)
		}
	}
}

func TestWarnings(t *testing.T) {
	for _, tt := range []struct {
		accel  string
		qemu   int
		kernel string
		want   bool
	}{
		{"tcg", 7, "6.1.0-56-cloud-amd64", false},
		{"tcg", 7, "6.12.107+deb13-cloud-amd64", true},
		{"tcg", 10, "6.12.107+deb13-cloud-amd64", false},
		{"kvm", 7, "6.12.107+deb13-cloud-amd64", false},
	} {
		p := &platform{arch: archX8664, accel: tt.accel, qemu: qemu{major: tt.qemu}, kernel: Kernel{Name: tt.kernel}}
		if got := p.warnings(); (len(got) > 0) != tt.want {
			t.Errorf("%+v: %q", tt, got)
		}
	}
}

func TestMissingThings(t *testing.T) {
	for name, cfg := range map[string]Config{
		"QEMU":    {QEMU: "qemu-system-nowhere"},
		"kernel":  {Kernel: "9.9-nowhere"},
		"busybox": {Busybox: "/nonexistent/busybox", Kernel: "6.1.0-fake"},
	} {
		cfg.StateDir = t.TempDir()
		writeFiles(t, cfg.StateDir, map[string][]byte{"kernels/6.1.0-fake/vmlinuz": bzImage("6.1.0-fake")})
		_, err := New(cfg)
		var missing *MissingError
		if !errors.As(err, &missing) || !strings.Contains(err.Error(), name) || missing.Hint == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, cfg := range []Config{{}, {StateDir: "x", Accel: "hax"}, {StateDir: "x", UIDs: -1}} {
		if _, err := New(cfg); err == nil {
			t.Errorf("%+v is taken", cfg)
		}
	}
}

func TestSweep(t *testing.T) {
	dir := t.TempDir()
	writeFiles(t, dir, map[string][]byte{scratchPrefix + "old/disk": nil, bootPrefix + "old": nil, scratchPrefix + "new/disk": nil, "other": nil})
	for _, name := range []string{scratchPrefix + "old", bootPrefix + "old", "other"} {
		past := time.Now().Add(-time.Hour)
		if err := os.Chtimes(filepath.Join(dir, name), past, past); err != nil {
			t.Fatal(err)
		}
	}
	if err := sweep(dir); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range left {
		names = append(names, e.Name())
	}
	if got := strings.Join(names, " "); got != "other "+scratchPrefix+"new" {
		t.Errorf("left: %s", got)
	}
}

func TestTSCFrequency(t *testing.T) {
	for _, tt := range []struct {
		values []float64
		want   int
	}{
		{[]float64{2000000, 2000100, 1999900}, 2000000},
		{[]float64{2000000, 2002000, 2000000}, 0},
		{[]float64{0, 0, 0}, 0},
	} {
		if got := agree(tt.values, 0.0005); got != tt.want {
			t.Errorf("%v: %d", tt.values, got)
		}
	}
	if !hasFlag("model name\t: x\nflags\t\t: fpu constant_tsc vme\nflags\t: nonstop_tsc\n", "constant_tsc") ||
		hasFlag("model name\t: x\nflags\t\t: fpu\nflags\t: nonstop_tsc\n", "nonstop_tsc") {
		t.Error("flags of the first processor are not read")
	}
	t.Logf("this machine: %d kHz", tscFrequency())
}
