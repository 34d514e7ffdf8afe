package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"nbd/server/config"
	"nbd/server/settings"
	"nbd/store"
)

// TestErrors: one sentence that names the thing, and once the way out.
func TestErrors(t *testing.T) {
	// Those of the tests, and whatever else there is, would be told.
	for _, v := range os.Environ() {
		if name, value, _ := strings.Cut(v, "="); strings.HasPrefix(name, "NBD_") {
			t.Setenv(name, value) // so that it comes back
			if err := os.Unsetenv(name); err != nil {
				t.Fatal(err)
			}
		}
	}
	locked := t.TempDir()
	st, err := store.Open(locked, store.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	file := func(text string) string {
		name := filepath.Join(t.TempDir(), "nbd.toml")
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return name
	}
	for _, c := range []struct {
		args   string
		status int
		names  string
		hint   string
	}{
		{"nonsense", 2, `no command "nonsense"`, "nbd help"},
		{"serve extra", 2, "nbd serve takes no arguments", "nbd help"},
		{"serve --nonsense", 2, "--nonsense", "nbd help"},
		{"admin nonsense", 2, `no command "nonsense"`, "nbd help"},
		{"serve --log-level loud", 1, "debug, info, warn", ""},
		{"serve --ssh-listen 127.0.0.1:0 --state " + t.TempDir() + " --qemu /no/qemu", 1, "/no/qemu", "apt install"},
		{"serve --ssh-listen 127.0.0.1:0 --state " + locked, 1, "in use by another nbd", "--state"},
		{"serve --ssh-listen 127.0.0.1 --state " + t.TempDir(), 1, "missing port", "--ssh-listen"},
		{"serve --config " + file("[settings]\ntime = 7\n"), 1, `[settings]: there is no setting "time"`, "nbd admin settings"},
		{"serve --config " + file("[sections]\n"), 1, "there is no section but [settings]", ""},
		{"serve --config /no/nbd.toml", 1, "/no/nbd.toml: no such file", "--config"},
		{"doctor --config " + t.TempDir(), 1, "is a directory", "--config"},
		{"serve --ssh-listen 127.0.0.1:0 --state " + file(""), 1, "not a directory", "--state"},
		{"admin status --state " + file(""), 1, "no server runs", "--state"},
		{"setup --state " + file(""), 1, "no server runs", "--state"},
		{"kernel list --state " + file(""), 1, "not a directory", "--state"},
		{"kernel import /no/linux.deb --state " + file(""), 1, "not a directory", "--state"},
		{"kernel import /no/linux.deb --state " + t.TempDir(), 1, "/no/linux.deb: no such file", "linux-image-"},
		{"kernel import " + file("no kernel") + " --state " + t.TempDir(), 1, "no kernel image", "vmlinuz and its modules"},
		{"kernel import " + t.TempDir() + " --state " + t.TempDir(), 1, "no kernel image", "linux-image-"},
		{"admin settings a b", 2, "one NAME", "nbd help"},
		{"admin token create alice --state " + t.TempDir(), 2, "--name", "nbd help"},
		{"admin status --state " + t.TempDir(), 1, "no server runs", "nbd serve"},
	} {
		var stderr bytes.Buffer
		if status := run(strings.Fields(c.args), &stderr, &stderr); status != c.status {
			t.Errorf("%s: status %d, want %d", c.args, status, c.status)
		}
		text, hint, _ := strings.Cut(stderr.String(), "\nnbd: hint: ")
		if !strings.Contains(text, c.names) || !strings.Contains(hint, c.hint) || (hint == "") != (c.hint == "") ||
			strings.Contains(strings.TrimSpace(text), "\n") || hint != "" && strings.Contains(text, strings.TrimSpace(hint)) {
			t.Errorf("%s:\n%s", c.args, stderr.String())
		}
	}
}

// TestUnknownVariables: what is misspelt in the server's environment is told,
// and what is no setting of a command does not reach it.
func TestUnknownVariables(t *testing.T) {
	got := config.UnknownVariables([]string{"NBD_SSH_LISTEN=x", "NBD_SSH_LISSTEN=x", "HOME=/", "NBD_STATE=", "NBD_KERNEL=", "NBD_HOST=x"})
	if want := []string{"NBD_HOST", "NBD_SSH_LISSTEN"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	t.Setenv("NBD_HOST", "other.example")
	t.Setenv("NBD_FOR", "windows")
	cmd := setupCommand()
	cfg := config.Of(cmd.Flags())
	if err := cfg.Load(); err != nil || cfg.Text("host") != "" || cfg.Text("for") != "nix.conf" {
		t.Errorf("%v; host %q for %q", err, cfg.Text("host"), cfg.Text("for"))
	}
}

// TestReadmeSettings: the README lists every setting of accounts as it is.
func TestReadmeSettings(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range settings.All() {
		value := s.Default
		if value != "" {
			value = "`" + value + "`"
		}
		if row := fmt.Sprintf("| `%s` | %s | %s | %s |\n", s.Name, value, s.Usage, s.Scope); !strings.Contains(string(readme), row) {
			t.Errorf("README.md lacks %s", row)
		}
	}
}
