package server

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"nbd/server/adminapi"
	"nbd/store"
)

// admin returns a client of the operator's socket of a test server.
func (ts *testServer) admin() *adminapi.Client {
	ts.t.Helper()
	dir, err := os.MkdirTemp("", "nbd") // a short path, as sockets want it
	if err != nil {
		ts.t.Fatal(err)
	}
	l, err := ListenAdmin(dir)
	if err != nil {
		ts.t.Fatal(err)
	}
	admin := NewAdmin(ts.store, ts.book, nil, ts.Disconnect, slog.New(slog.DiscardHandler))
	served := make(chan error, 1)
	go func() { served <- admin.Serve(l) }()
	ts.t.Cleanup(func() {
		if err := errors.Join(admin.Close(), <-served, os.RemoveAll(dir)); err != nil {
			ts.t.Error(err)
		}
	})
	return adminapi.NewClient(dir)
}

// set changes a setting as the operator does.
func set(t *testing.T, c *adminapi.Client, o adminapi.SettingsOwner, name, value string) adminapi.Setting {
	t.Helper()
	s, err := c.ChangeSetting(t.Context(), adminapi.SettingChange{SettingsOwner: o, Name: name, Op: "set", Value: value})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestSettingsLevels: system, account, key and environment win in this order,
// each is told with its origin, and all survive until they are reset.
func TestSettingsLevels(t *testing.T) {
	ts := newTestServer(t, func(c *Config) { c.Settings = map[string]string{"timeout": "100"} })
	admin := ts.admin()
	print := gossh.FingerprintSHA256(ts.alice.PublicKey())
	account, key := adminapi.SettingsOwner{Account: "alice"}, adminapi.SettingsOwner{Key: print}
	s := &Session{Client: &Client{Account: ts.account, Fingerprint: print}, Env: map[string]string{}, Log: slog.New(slog.DiscardHandler), book: ts.book}
	expect := func(timeout int, origin string) {
		t.Helper()
		if err := s.setSettings(); err != nil {
			t.Fatal(err)
		}
		e, err := s.settingsFor(nil, Limits{})
		if err != nil || e.Timeout != time.Duration(timeout)*time.Second || e.Origin("timeout").String() != origin || s.Settings.Timeout != e.Timeout {
			t.Errorf("timeout %v from %q, %v; want %d from %q", e.Timeout, e.Origin("timeout"), err, timeout, origin)
		}
	}
	expect(100, "system")
	set(t, admin, adminapi.SettingsOwner{}, "timeout", "90")
	expect(90, "system")
	if got := set(t, admin, account, "timeout", "7"); got.Text != "7" || got.Origin != "account" {
		t.Errorf("%+v", got)
	}
	expect(7, "account")
	set(t, admin, key, "timeout", "8")
	expect(8, "key")
	s.Env["NIXBUILDNET_TIMEOUT"] = "9"
	expect(9, "environment (NIXBUILDNET_TIMEOUT)")
	s.Env["NBD_TIMEOUT"] = "1000"
	expect(90, "environment (NBD_TIMEOUT), as far as the system allows")
	set(t, admin, account, "settings-from-ssh-env", "false")
	expect(8, "key")
	for _, o := range []adminapi.SettingsOwner{key, account} {
		if _, err := admin.ChangeSetting(t.Context(), adminapi.SettingChange{SettingsOwner: o, Name: "timeout", Op: "reset"}); err != nil {
			t.Fatal(err)
		}
	}
	expect(90, "system")
}

// TestSettingsMistakes: one clear error, and nothing is changed.
func TestSettingsMistakes(t *testing.T) {
	ts := newTestServer(t, nil)
	admin := ts.admin()
	for _, c := range []struct {
		change adminapi.SettingChange
		want   string
	}{
		{adminapi.SettingChange{Name: "time", Op: "set", Value: "1"}, `no setting "time"`},
		{adminapi.SettingChange{Name: "timeout", Op: "set", Value: "soon"}, `setting timeout is "soon"`},
		{adminapi.SettingChange{Name: "timeout", Op: "burn"}, "no operation"},
		{adminapi.SettingChange{Name: "public-cache", Op: "set", Value: "true"}, "single accounts"},
		{adminapi.SettingChange{SettingsOwner: adminapi.SettingsOwner{Account: "bob"}, Name: "timeout", Op: "set", Value: "1"}, `no account "bob"`},
		{adminapi.SettingChange{SettingsOwner: adminapi.SettingsOwner{Key: "SHA256:x"}, Name: "timeout", Op: "set", Value: "1"}, "no key"},
		{adminapi.SettingChange{SettingsOwner: adminapi.SettingsOwner{Account: "alice"}, Name: "signing-key-for-builds", Op: "set", Value: "other-1"}, "test/alice-1 only"},
	} {
		_, err := admin.ChangeSetting(t.Context(), c.change)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v", c.change, err)
		}
	}
	if now := ts.store.Settings(); len(now.System) > 0 || len(now.Accounts[ts.account.ID].Values) > 0 {
		t.Errorf("changed: %+v", now)
	}
}

// TestLink: the operator's word counts for both sides, all or nothing; one side's
// wish stays one side's.
func TestLink(t *testing.T) {
	ts := newTestServer(t, nil)
	admin := ts.admin()
	bob := ts.addAccount("bob", newKey(t), nil)
	trust := func() (a, b []string) {
		ea, eb := ts.book.account(ts.account.ID), ts.book.account(bob.ID)
		return ea.TrustedAccounts, eb.TrustedAccounts
	}
	link := adminapi.Link{A: "alice", B: "bob"}
	for range 2 { // twice is no mistake
		if _, err := admin.Link(t.Context(), link); err != nil {
			t.Fatal(err)
		}
	}
	if a, b := trust(); !slices.Equal(a, []string{"bob"}) || !slices.Equal(b, []string{"alice"}) {
		t.Errorf("linked: %q, %q", a, b)
	}
	if _, err := admin.Unlink(t.Context(), link); err != nil {
		t.Fatal(err)
	}
	if a, b := trust(); len(a)+len(b) > 0 {
		t.Errorf("unlinked: %q, %q", a, b)
	}
	for _, f := range []func(context.Context, adminapi.Link) (adminapi.Link, error){admin.Link, admin.Unlink} {
		for _, l := range []adminapi.Link{{A: "alice", B: "alice"}, {A: "alice", B: "carol"}, {A: "carol", B: "alice"}} {
			if _, err := f(t.Context(), l); err == nil {
				t.Errorf("%+v is no error", l)
			}
		}
	}
	if _, err := admin.Unlink(t.Context(), link); err == nil {
		t.Error("ending no link is no error")
	}
	if a, b := trust(); len(a)+len(b) > 0 {
		t.Errorf("after mistakes: %q, %q", a, b)
	}
}

// TestAdminTokens: made, listed without secret, revoked at once.
func TestAdminTokens(t *testing.T) {
	ts := newTestServer(t, nil)
	admin := ts.admin()
	made, err := admin.AddToken(t.Context(), adminapi.NewToken{Account: "alice", Name: "ci", Seconds: 3600})
	if err != nil {
		t.Fatal(err)
	}
	if slices.Contains(made.Permissions, string(AccountWrite)) || !slices.Contains(made.Permissions, string(BuildWrite)) || time.Until(made.Expires) > time.Hour {
		t.Errorf("%+v", made.TokenInfo)
	}
	c := ts.dialToken()
	if err := ts.ping(c, "NBD_TOKEN", made.Secret); err != nil {
		t.Fatal(err)
	}
	list, err := admin.Tokens(t.Context(), "alice")
	if err != nil || len(list) != 1 || list[0].Name != "ci" {
		t.Errorf("%+v, %v", list, err)
	}
	for _, bad := range []adminapi.NewToken{{Account: "alice", Name: "ci"}, {Account: "alice", Name: ""}, {Account: "bob", Name: "x"},
		{Account: "alice", Name: "x", Permissions: []string{"root"}}, {Account: "alice", Name: "x", Seconds: -1}} {
		if _, err := admin.AddToken(t.Context(), bad); err == nil {
			t.Errorf("%+v is no error", bad)
		}
	}
	if err := admin.RemoveToken(t.Context(), "alice", "ci"); err != nil {
		t.Fatal(err)
	}
	if err := ts.ping(c, "NBD_TOKEN", made.Secret); err == nil {
		t.Error("the connection of a revoked token stays")
	}
	if err := ts.ping(ts.dialToken(), "NBD_TOKEN", made.Secret); err == nil {
		t.Error("a revoked token opens")
	}
	if err := admin.RemoveToken(t.Context(), "alice", "ci"); err == nil {
		t.Error("revoking nothing is no error")
	}
}

// TestDefaultPermissions: a key added later has what the account's settings say,
// a first one all.
func TestDefaultPermissions(t *testing.T) {
	ts := newTestServer(t, nil)
	admin := ts.admin()
	line := func() []string { return []string{string(gossh.MarshalAuthorizedKey(newKey(t).PublicKey()))} }
	add := func(permissions []string) []string {
		t.Helper()
		keys, err := admin.AddKeys(t.Context(), adminapi.NewKeys{Account: "alice", Keys: line(), Permissions: permissions})
		if err != nil {
			t.Fatal(err)
		}
		return keys[0].Permissions
	}
	if got := add(nil); len(got) != 5 || slices.Contains(got, string(AccountWrite)) {
		t.Errorf("%q", got)
	}
	set(t, admin, adminapi.SettingsOwner{Account: "alice"}, "default-permissions", "store:read")
	if got := add(nil); !slices.Equal(got, []string{"store:read"}) {
		t.Errorf("%q", got)
	}
	if got := add([]string{"account:write"}); !slices.Equal(got, []string{"account:write"}) {
		t.Errorf("%q", got)
	}
	acc, err := admin.AddAccount(t.Context(), adminapi.NewKeys{Account: "bob", Keys: line()})
	if err != nil || len(acc.Keys[0].Permissions) != len(store.Permissions()) {
		t.Errorf("%+v, %v", acc, err)
	}
}

// TestWrongEnvironment: a session with a wrong variable is refused in one line
// that names it; an unknown one is passed over with a note.
func TestWrongEnvironment(t *testing.T) {
	ts := newTestServer(t, nil)
	c := ts.dial(ts.alice)
	for variable, value := range map[string]string{"NBD_TIMEOUT": "soon", "NIXBUILDNET_MAX_STORAGE": "1", "NBD_TAG_": "x"} {
		s, err := c.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Setenv(variable, value); err != nil {
			t.Fatal(err)
		}
		out, err := s.CombinedOutput("nix-daemon --stdio")
		if err == nil || !strings.HasPrefix(string(out), "nbd: error: "+variable+" ") || strings.Count(string(out), "\n") != 1 {
			t.Errorf("%s: %v, %q", variable, err, out)
		}
	}
	if err := ts.ping(c, "NBD_TIMEOUTS", "1"); err != nil {
		t.Error(err)
	}
	if !strings.Contains(ts.log.String(), "NBD_TIMEOUTS") {
		t.Error("no note in the log of what names no setting")
	}
	// Without account:write, no more than what is open.
	key := ts.addKey("store:read")
	if err := ts.ping(ts.dial(key), "NBD_SUBSTITUTERS", "https://x.example"); err == nil || !strings.Contains(err.Error(), "account:write") {
		t.Errorf("a guarded setting: %v", err)
	}
	if err := ts.ping(ts.dial(key), "NBD_TIMEOUT", "5"); err != nil {
		t.Error(err)
	}
}
