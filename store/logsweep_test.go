package store

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"
)

// putLogs stores a log of each kind, and one that goes on: that of build 2.
func putLogs(t *testing.T, s *Store, a AccountID) *BuildLog {
	t.Helper()
	ctx := t.Context()
	done, err := s.CreateBuildLog(ctx, 1)
	if err == nil {
		_, err = io.WriteString(done, "one")
		err = errors.Join(err, done.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := s.PutLog(ctx, a, strings.Repeat("0", 32)+"-x.drv", strings.NewReader("uploaded")); err != nil {
		t.Fatal(err)
	}
	live, err := s.CreateBuildLog(ctx, 2)
	if err != nil {
		t.Fatal(err)
	}
	return live
}

// logsOf tells which of what putLogs stored are there.
func logsOf(t *testing.T, s *Store, a AccountID) string {
	var there []string
	for _, id := range []BuildID{1, 2} {
		if r, err := s.OpenBuildLog(t.Context(), id); err == nil {
			there = append(there, fmt.Sprint(id))
			_ = r.Close()
		}
	}
	if r, err := s.Log(t.Context(), a, strings.Repeat("0", 32)+"-x.drv"); err == nil {
		there = append(there, "uploaded")
		_ = r.Close()
	}
	return strings.Join(there, " ")
}

// Logs go by age, and earlier where the disk is full; never what is written.
func TestSweepLogs(t *testing.T) {
	for _, tt := range []struct {
		name  string
		cfg   Config
		after time.Duration
		want  string
	}{
		{"young", Config{KeepLogs: 24 * time.Hour, MinFree: -1}, 23 * time.Hour, "1 2 uploaded"},
		{"old", Config{KeepLogs: 24 * time.Hour, MinFree: -1}, 25 * time.Hour, "2"},
		{"for ever", Config{MinFree: -1}, 10_000 * time.Hour, "1 2 uploaded"},
		{"full", Config{KeepLogs: 24 * time.Hour, MinFree: 1 << 60}, 2 * time.Hour, "2"},
		{"full, recent", Config{KeepLogs: 24 * time.Hour, MinFree: 1 << 60}, time.Minute, "1 2 uploaded"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var later time.Duration
			tt.cfg.Now = func() time.Time { return time.Now().Add(later) }
			s, err := Open(t.TempDir(), tt.cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			alice := addAccount(t, s, "alice")
			minFree := s.cfg.MinFree
			s.cfg.MinFree = -1 // while they are written
			live := putLogs(t, s, alice)
			s.cfg.MinFree, later = minFree, tt.after
			freed, err := s.Sweep(t.Context())
			if got := logsOf(t, s, alice); err != nil || got != tt.want || (freed > 0) != (got == "2") {
				t.Errorf("%q are there, freed %d, %v", got, freed, err)
			}
			s.cfg.MinFree = -1
			if err := live.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}
