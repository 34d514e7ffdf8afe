package server

import (
	"log/slog"
	"strings"
	"testing"
	"time"

	"nbd/nixproto"
	"nbd/server/adminapi"
)

// TestSettingsFor: what a derivation says counts only if it may, then above the
// environment and below what the client sends, and never above the system.
func TestSettingsFor(t *testing.T) {
	ts := newTestServer(t, nil)
	admin := ts.admin()
	var log syncBuffer
	s := &Session{Client: &Client{Account: ts.account, Permissions: []string{"build:write"}}, Env: map[string]string{"NBD_TIMEOUT": "40", "NBD_TAG_A": "env"},
		Log: slog.New(slog.NewTextHandler(&log, nil)), book: ts.book}
	if err := s.setSettings(); err != nil {
		t.Fatal(err)
	}
	drv := &nixproto.Derivation{Name: "x", Env: map[string]string{"NIXBUILDNET_TIMEOUT": "30", "NBD_TAG_A": "drv", "NBD_TIMEOUTS": "1", "NBD": "1"}}
	expect := func(sent, want time.Duration, tag string) {
		t.Helper()
		e, err := s.settingsFor(drv, Limits{Timeout: sent})
		if err != nil || e.Timeout != want || e.Tags["A"] != tag {
			t.Errorf("timeout %v from %v, tag %q, %v; want %v, %q", e.Timeout, e.Origin("timeout"), e.Tags["A"], err, want, tag)
		}
	}
	expect(0, 40*time.Second, "env")
	alice := adminapi.SettingsOwner{Account: "alice"}
	set(t, admin, alice, "settings-from-drv-env", "true") // counts in a session that is open
	expect(0, 30*time.Second, "drv")
	if !strings.Contains(log.String(), "NBD_TIMEOUTS") || strings.Contains(log.String(), "attribute=NBD ") {
		t.Errorf("notes: %s", log.String())
	}
	expect(20*time.Second, 20*time.Second, "drv")
	set(t, admin, adminapi.SettingsOwner{}, "timeout", "10")
	expect(0, 10*time.Second, "drv")
	expect(20*time.Second, 10*time.Second, "drv")
	for variable, want := range map[string]string{"NBD_MAX_STORAGE": "operator", "NBD_MAX_CPU_HOURS_PER_MONTH": "max-cpu-hours-per-month", "NBD_CACHES": "account:write"} {
		drv.Env = map[string]string{variable: "1"}
		if _, err := s.settingsFor(drv, Limits{}); err == nil || !strings.Contains(err.Error(), variable) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", variable, err)
		}
	}
	drv.Env = map[string]string{"NBD_TIMEOUT": "soon"}
	if _, err := s.settingsFor(drv, Limits{}); err == nil || !strings.HasPrefix(err.Error(), `NBD_TIMEOUT is "soon"`) {
		t.Error(err)
	}
	set(t, admin, alice, "settings-from-drv-env", "false")
	expect(0, 10*time.Second, "env")
	// A removed account has what the system says, and no more.
	if err := admin.RemoveAccount(t.Context(), "alice"); err != nil {
		t.Fatal(err)
	}
	if e := ts.book.account(ts.account.ID); e.Origin("settings-from-drv-env").Level != 0 {
		t.Errorf("settings of a removed account: %v", e.Origin("settings-from-drv-env"))
	}
}
