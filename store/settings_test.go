package store_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nbd/store"
	"nbd/store/storetest"
)

// sshKey returns an SSH key in wire format; it has the form and no more.
func sshKey(n byte) store.Key {
	wire := append([]byte("\x00\x00\x00\x0bssh-ed25519\x00\x00\x00\x20"), make([]byte, 31)...)
	return store.Key{Wire: append(wire, n)}
}

// reopenSettings closes a store and opens it again.
func reopenSettings(t *testing.T, s *store.Store, dir string) *store.Store {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return storetest.OpenDir(t, dir, store.Config{})
}

// put sets one value of an owner.
func put(t *testing.T, s *store.Store, o store.SettingsOwner, name, value string) {
	t.Helper()
	err := s.ChangeSettings(t.Context(), []store.SettingsOwner{o}, func(values []map[string]string) error {
		values[0][name] = value
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestSettings: stored for each owner by itself, in one transaction, through a
// restart, and until the owner ends.
func TestSettings(t *testing.T) {
	ctx, dir := t.Context(), t.TempDir()
	s := storetest.OpenDir(t, dir, store.Config{})
	key := sshKey(1)
	a, err := s.AddAccount(ctx, "alice", key, sshKey(2))
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.AddAccount(ctx, "bob")
	if err != nil {
		t.Fatal(err)
	}
	keys, err := s.Keys(ctx, a.ID)
	if err != nil {
		t.Fatal(err)
	}
	print := keys[0].Fingerprint
	key.Wire = keys[0].Wire
	system, alice, bob, alicesKey := store.SettingsOwner{}, store.SettingsOwner{Account: a.ID}, store.SettingsOwner{Account: b.ID}, store.SettingsOwner{a.ID, print}
	before := s.Settings()
	put(t, s, system, "timeout", "1")
	put(t, s, alice, "timeout", "2")
	put(t, s, alicesKey, "timeout", "3")
	if before.System != nil || before.Accounts[a.ID].Values != nil {
		t.Error("what was returned before has changed")
	}
	if got, old := s.Settings().Accounts[b.ID], before.Accounts[b.ID]; got != old {
		t.Error("an account that did not change is not the same value")
	}
	check := func() {
		t.Helper()
		now := s.Settings()
		for o, want := range map[store.SettingsOwner]string{system: "1", alice: "2", alicesKey: "3", bob: "", {b.ID, print}: ""} {
			if got := now.Of(o)["timeout"]; got != want {
				t.Errorf("%+v: %q, want %q", o, got, want)
			}
		}
		if now.Accounts[a.ID].Account.PublicKey != a.PublicKey {
			t.Error("the account is another one")
		}
	}
	check()
	// All or nothing.
	refused := errors.New("refused")
	err = s.ChangeSettings(ctx, []store.SettingsOwner{alice, bob}, func(values []map[string]string) error {
		values[0]["timeout"], values[1]["timeout"] = "7", "8"
		return refused
	})
	if !errors.Is(err, refused) {
		t.Error(err)
	}
	for _, o := range []store.SettingsOwner{{Account: 99}, {b.ID, print}, {a.ID, "SHA256:none"}} {
		if err := s.ChangeSettings(ctx, []store.SettingsOwner{alice, o}, func(values []map[string]string) error {
			values[0]["timeout"] = "9"
			return nil
		}); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("%+v: %v", o, err)
		}
	}
	check()
	s = reopenSettings(t, s, dir)
	check()
	if _, err := s.RemoveKey(ctx, print); err != nil {
		t.Fatal(err)
	}
	if s.Settings().Of(alicesKey) != nil {
		t.Error("a removed key has settings")
	}
	if _, err := s.AddKey(ctx, b.ID, key); err != nil {
		t.Fatal(err)
	}
	if err := s.RemoveAccount(ctx, a.ID); err != nil {
		t.Fatal(err)
	}
	if _, ok := s.Settings().Accounts[a.ID]; ok {
		t.Error("a removed account has settings")
	}
	s = reopenSettings(t, s, dir)
	if diff := cmp.Diff(map[string]string{"timeout": "1"}, s.Settings().Of(system)); diff != "" || len(s.Settings().Accounts) != 1 {
		t.Error(diff, s.Settings().Accounts)
	}
}

// TestTokens: only the hash is stored; what is no token now is not found,
// whatever it was.
func TestTokens(t *testing.T) {
	ctx, dir := t.Context(), t.TempDir()
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	s, err := store.Open(dir, store.Config{MinFree: -1, Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	a, err := s.AddAccount(ctx, "alice")
	if err != nil {
		t.Fatal(err)
	}
	secret, made, err := s.AddToken(ctx, a.ID, store.Token{Name: "ci", Permissions: []string{"store:read"}, Expires: now.Add(time.Hour)})
	if err != nil || !strings.HasPrefix(secret, "nbd_") || len(secret) != len("nbd_")+43 {
		t.Fatalf("%q, %v", secret, err)
	}
	got, token, err := s.AccountByToken(ctx, secret)
	if err != nil || got.ID != a.ID {
		t.Fatalf("%+v, %v", got, err)
	}
	if diff := cmp.Diff(made, token); diff != "" {
		t.Error(diff)
	}
	if other, _, err := s.AddToken(ctx, a.ID, store.Token{Name: "other"}); err != nil || other == secret {
		t.Errorf("%v; the same secret %v", err, other == secret)
	}
	for _, bad := range []store.Token{{Name: ""}, {Name: "a b"}, {Name: "x", Permissions: []string{"root"}}} {
		if _, _, err := s.AddToken(ctx, a.ID, bad); !errors.Is(err, store.ErrInvalid) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	if _, _, err := s.AddToken(ctx, a.ID, store.Token{Name: "ci"}); !errors.Is(err, store.ErrExists) {
		t.Errorf("the same name: %v", err)
	}
	now = now.Add(time.Hour)
	if _, _, err := s.AccountByToken(ctx, secret); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("expired: %v", err)
	}
	again, _, err := s.AddToken(ctx, a.ID, store.Token{Name: "ci"})
	if err != nil {
		t.Errorf("the name of an expired one: %v", err)
	}
	if list, err := s.Tokens(ctx, a.ID); err != nil || len(list) != 2 || list[0].Name != "ci" {
		t.Errorf("%+v, %v", list, err)
	}
	if _, err := s.RemoveToken(ctx, a.ID, "ci"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.RemoveToken(ctx, a.ID, "ci"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("twice: %v", err)
	}
	if _, _, err := s.AccountByToken(ctx, again); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("revoked: %v", err)
	}
	last, _, err := s.AddToken(ctx, a.ID, store.Token{Name: "last"})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.RemoveAccount(ctx, a.ID); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.AccountByToken(ctx, last); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("of a removed account: %v", err)
	}
	if _, _, err := s.AddToken(ctx, a.ID, store.Token{Name: "new"}); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("for a removed account: %v", err)
	}
}
