package store

import (
	"context"
	"fmt"
	"time"

	bolt "go.etcd.io/bbolt"
)

// Usage sums the builds of an account that were created in one month (UTC).
type Usage struct {
	Builds    int64 `json:"builds"`    // runs, whatever their end
	Succeeded int64 `json:"succeeded"` // of them
	Reused    int64 `json:"reused"`    // requests that were answered without a run
	// Wall is how long ended runs took, from when they left the queue.
	Wall time.Duration `json:"wall"`
	// CPUSeconds and LimitSeconds are sums of those of Build.
	CPUSeconds   int64 `json:"cpuSeconds"`
	LimitSeconds int64 `json:"limitSeconds"`
}

// add adds n times v.
func (u *Usage) add(v Usage, n int64) {
	u.Builds += n * v.Builds
	u.Succeeded += n * v.Succeeded
	u.Reused += n * v.Reused
	u.Wall += time.Duration(n) * v.Wall
	u.CPUSeconds += n * v.CPUSeconds
	u.LimitSeconds += n * v.LimitSeconds
}

// usageOf is what one build adds to its month.
func usageOf(b *Build) Usage {
	switch {
	case b.refused():
		return Usage{}
	case b.Reused:
		return Usage{Reused: 1}
	}
	u := Usage{Builds: 1, CPUSeconds: b.CPUSeconds, LimitSeconds: b.LimitSeconds}
	if b.Status == StatusBuilt {
		u.Succeeded = 1
	}
	if !b.Started.IsZero() && !b.Stopped.IsZero() {
		u.Wall = b.Stopped.Sub(b.Started)
	}
	return u
}

// usageKey is an account, eight bytes, and a month like "2026-11".
func usageKey(a AccountID, month time.Time) string {
	return string(idKey(uint64(a))) + month.UTC().Format("2006-01")
}

// usageChanges are what one transaction adds, by key.
type usageChanges map[string]Usage

// add adds n times a build.
func (c usageChanges) add(b *Build, n int64) {
	k := usageKey(b.Account, b.Created)
	u := c[k]
	u.add(usageOf(b), n)
	c[k] = u
}

func (c usageChanges) put(tx *bolt.Tx) error {
	bucket := tx.Bucket(bucketUsage)
	for k, change := range c {
		if change == (Usage{}) {
			continue
		}
		var sum Usage
		if _, err := getJSON(bucket, []byte(k), &sum); err != nil {
			return fmt.Errorf("usage: %w", err)
		}
		sum.add(change, 1)
		if err := putJSON(bucket, []byte(k), sum); err != nil {
			return err
		}
	}
	return nil
}

// Usage returns the sums of the month that month lies in.
func (s *Store) Usage(ctx context.Context, a AccountID, month time.Time) (u Usage, err error) {
	if err := s.flushBuilds(); err != nil {
		return u, err
	}
	err = s.db.View(func(tx *bolt.Tx) error {
		_, err := getJSON(tx.Bucket(bucketUsage), []byte(usageKey(a, month)), &u)
		return err
	})
	if err != nil {
		return u, fmt.Errorf("usage of account %d: %w", a, databaseError(err))
	}
	return u, nil
}
