package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"nbd/nixproto"
	"nbd/nixproto/nar"
)

// One account has at most what it leaves to others, and all comes back.
func TestCharges(t *testing.T) {
	const all = 16 * chargeStep
	s := &Store{charges: newCharges(all)}
	a1, a2, b := s.NewCharge(1), s.NewCharge(1), s.NewCharge(2)
	for _, step := range []struct {
		h  *Charge
		n  int64
		ok bool
	}{
		{a1, chargeStep - 1, true},  // not counted
		{a1, 9 * chargeStep, false}, // more than it leaves
		{a1, 4 * chargeStep, true},
		{a2, 5 * chargeStep, false}, // the same account
		{a2, 4 * chargeStep, true},
		{b, 5 * chargeStep, false},
		{b, 4 * chargeStep, true}, // another one still can
		{a1, chargeStep, true},
		{a1, 3 * chargeStep, false},
		{b, 5 * chargeStep, true},
	} {
		before := step.h.taken
		err := step.h.Set(step.n)
		if (err == nil) != step.ok || (err != nil && !errors.Is(err, ErrBusy)) {
			t.Errorf("%d of account %d: %v", step.n/chargeStep, step.h.account, err)
		}
		if err != nil && step.h.taken != before {
			t.Errorf("a refused %d changed what is held", step.n)
		}
	}
	for _, h := range []*Charge{a1, a2, b, b} {
		h.Release()
	}
	if s.charges.left != all || len(s.charges.held) != 0 {
		t.Errorf("left %d of %d, %v", s.charges.left, all, s.charges.held)
	}
}

// manyFiles returns a NAR of n files, and what is known of its path.
func manyFiles(t *testing.T, name string, n int) (*nixproto.PathInfo, []byte) {
	t.Helper()
	var buf bytes.Buffer
	w := nar.NewWriter(&buf)
	err := w.Directory("")
	for i := range n {
		err = errors.Join(err, w.File(fmt.Sprintf("%08d", i), false, 0))
	}
	if err = errors.Join(err, w.EndDirectory(), w.Close()); err != nil {
		t.Fatal(err)
	}
	return &nixproto.PathInfo{
		Path:    nixproto.StorePath("/nix/store/" + strings.Repeat("0", 31) + "1-" + name),
		NarHash: nixproto.SumSHA256(buf.Bytes()), NarSize: uint64(buf.Len()),
	}, buf.Bytes()
}

// A NAR of more files than there is memory for is refused wherever it arrives,
// leaves nothing behind, and does not keep others out.
func TestChargeBoundsIndexes(t *testing.T) {
	s, err := Open(t.TempDir(), Config{MinFree: -1, Memory: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ctx := t.Context()
	alice, bob := addAccount(t, s, "alice"), addAccount(t, s, "bob")
	large, largeNAR := manyFiles(t, "large", 60_000)
	small, smallNAR := manyFiles(t, "small", 4_000)
	upload := func(a AccountID, info *nixproto.PathInfo, b []byte) error {
		u, err := s.NewUpload(ctx, a, UploadOptions{})
		if err != nil {
			return err
		}
		defer u.Abort()
		if err := u.Add(info, bytes.NewReader(b)); err != nil {
			return err
		}
		return u.Commit()
	}
	if err := upload(alice, large, largeNAR); !errors.Is(err, ErrBusy) {
		t.Errorf("upload: %v", err)
	}
	var staged []*Staged
	for err = nil; err == nil && len(staged) < 100; {
		var st *Staged
		if st, err = s.Stage(ctx, alice); err == nil {
			staged = append(staged, st)
			if _, err = st.Write(smallNAR); err == nil {
				err = st.Finish()
			}
		}
	}
	if !errors.Is(err, ErrBusy) {
		t.Errorf("%d staged: %v", len(staged), err)
	}
	if err := upload(bob, small, smallNAR); err != nil {
		t.Errorf("another account: %v", err)
	}
	for _, st := range staged {
		st.Discard()
	}
	if err := upload(alice, small, smallNAR); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	checkNothingHeld(t, s)
}

// What is known of the paths of a burst counts, too.
func TestChargeBoundsRecords(t *testing.T) {
	s, err := Open(t.TempDir(), Config{MinFree: -1, Memory: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	alice := addAccount(t, s, "alice")
	info, b := manyFiles(t, "signed", 1)
	info.Signatures = []string{strings.Repeat("x", 1<<20)}
	u, err := s.NewUpload(t.Context(), alice, UploadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for ; err == nil && n < 100; n++ {
		info.Path = nixproto.StorePath(fmt.Sprintf("/nix/store/%032d-signed", n))
		err = u.Add(info, bytes.NewReader(b))
		if n == 0 {
			err = errors.Join(err, u.Checkpoint()) // gives it back
		}
	}
	if !errors.Is(err, ErrBusy) || n < 3 {
		t.Errorf("path %d: %v", n, err)
	}
	u.Abort()
	checkNothingHeld(t, s)
}

// checkNothingHeld wants all memory to be given back.
func checkNothingHeld(t *testing.T, s *Store) {
	t.Helper()
	if len(s.charges.held) != 0 || s.charges.left != s.cfg.Memory {
		t.Errorf("still held: %v, left %d", s.charges.held, s.charges.left)
	}
}

// addAccount makes an account.
func addAccount(t *testing.T, s *Store, name string) AccountID {
	t.Helper()
	a, err := s.AddAccount(context.Background(), name)
	if err != nil {
		t.Fatal(err)
	}
	return a.ID
}
