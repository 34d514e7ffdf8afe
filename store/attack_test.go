package store_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"nbd/nixproto"
	"nbd/store"
	"nbd/store/storetest"
)

// Who claims the hash of what another account has is answered, and served, as
// if nobody had it: also when there is no room for it, and with the right bytes.
func TestAttackKnownHash(t *testing.T) {
	dir := t.TempDir()
	s, err := store.Open(dir, store.Config{MinFree: -1})
	if err != nil {
		t.Fatal(err)
	}
	alice, mallory := storetest.Account(t, s, "alice"), storetest.Account(t, s, "mallory")
	secret, guess := big(1, 100<<10), big(2, 100<<10)
	info := storetest.Source("secret", secret)
	storetest.Add(t, s, alice, info, secret)
	absent := nixproto.SumSHA256([]byte("nobody has this"))
	claim := func(hash nixproto.Hash, nar []byte) error {
		up, err := s.NewUpload(ctx, mallory, store.UploadOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer up.Abort()
		claimed := *storetest.Source("guess", nar)
		claimed.NarHash = hash
		return up.Add(&claimed, bytes.NewReader(nar))
	}
	compare := func(want error) {
		t.Helper()
		a, b := claim(info.NarHash, guess), claim(absent, guess)
		if !errors.Is(a, want) || !errors.Is(b, want) ||
			strings.ReplaceAll(a.Error(), info.NarHash.String(), "") != strings.ReplaceAll(b.Error(), absent.String(), "") {
			t.Errorf("of what alice has: %v; of what nobody has: %v", a, b)
		}
	}
	compare(store.ErrInvalid)
	if valid, err := s.Valid(ctx, mallory, []nixproto.StorePath{info.Path}); err != nil || len(valid) > 0 {
		t.Errorf("mallory sees %v, %v", valid, err)
	}
	// The right bytes are stored once, whoever brings them.
	storetest.Add(t, s, mallory, info, secret)
	if got := content(t, s, mallory, info.Path); !bytes.Equal(got, secret) {
		t.Error("mallory's content is another")
	}
	if st, err := s.Stats(ctx); err != nil || st.Blobs != 1 {
		t.Errorf("stored: %+v, %v", st, err)
	}
	storetest.Check(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	if s, err = store.Open(dir, store.Config{MinFree: 1 << 60}); err != nil {
		t.Fatal(err)
	}
	compare(store.ErrNoSpace)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// Links and offers that end take nothing from what was chosen, and give nothing
// more.
func TestAttackSightAfterUnlink(t *testing.T) {
	l := newLending(t)
	before := l.add(l.alice, "before", "x", nil)
	signed := l.add(l.alice, "signed", "x", []nixproto.SigningKey{l.key})
	both := linked(l.alice)
	both.Keys = []nixproto.PublicKey{l.key.Public()}
	offer := both
	offer.Linked, offer.Offers = nil, []store.Offer{{Account: l.alice, Keys: both.Keys}}
	v, o := l.sight(l.bob, both), l.sight(l.bob, offer)
	l.sees("linked", v, before.Path, before)
	v.Restrict(both)
	o.Restrict(offer)
	l.sees("offered", o, signed.Path, signed)
	after := l.add(l.alice, "after", "x", []nixproto.SigningKey{l.key})
	v.Restrict(store.Trust{})
	o.Restrict(store.Trust{})
	l.sees("chosen", v, before.Path, before)
	l.sees("chosen", o, signed.Path, signed)
	l.sees("after the link", v, after.Path, nil)
	l.sees("after the offer", o, after.Path, nil)
	v.Restrict(both) // trust that comes back is for new sessions
	l.sees("after the link", v, after.Path, nil)
}

// Uploaded logs count for what an account may have.
func TestAttackLogsAreCounted(t *testing.T) {
	s := storetest.Open(t)
	mallory := storetest.Account(t, s, "mallory")
	before, err := s.ViewSize(ctx, mallory)
	if err != nil || before != 0 {
		t.Fatal(before, err)
	}
	noise := big(3, 300<<10) // which does not compress
	for _, name := range []string{"a", "b"} {
		if err := s.PutLog(ctx, mallory, strings.Repeat("0", nixproto.HashPartLen)+"-"+name+".drv", bytes.NewReader(noise)); err != nil {
			t.Fatal(err)
		}
	}
	if after, err := s.ViewSize(ctx, mallory); err != nil || after < 600<<10 {
		t.Errorf("size %d, %v", after, err)
	}
}
