package server

import (
	"context"
	"errors"
	"time"

	"nbd/reuse"
	"nbd/server/adminapi"
	"nbd/store"
)

// An apiBuild is a build as the shell, `api` and HTTP show it. Members that are
// not known yet are null.
type apiBuild struct {
	BuildID                store.BuildID     `json:"build_id"`
	CreateTime             apiTime           `json:"create_time"`
	StartTime              *apiTime          `json:"start_time"`
	QueueTimeSeconds       float64           `json:"queue_time_seconds"`
	DurationSeconds        float64           `json:"duration_seconds"`
	BuildStatus            string            `json:"build_status"`
	Status                 string            `json:"status"` // the same
	StatusMessage          string            `json:"status_message"`
	CPUCount               int               `json:"cpu_count"`
	AllocatedMegabytes     int               `json:"allocated_megabytes"`
	CPUSeconds             int64             `json:"cpu_seconds"` // what it costs
	PeakMemoryUseKilobytes int64             `json:"peak_memory_use_kilobytes"`
	PeakStorageKilobytes   int64             `json:"peak_storage_use_kilobytes"`
	DerivationPath         string            `json:"derivation_path"`
	System                 string            `json:"system"`
	Outputs                []apiBuildOutput  `json:"outputs"`
	Tags                   map[string]string `json:"tags"`
	RestartOf              *store.BuildID    `json:"restart_of_build_id"`
	RestartedAs            *store.BuildID    `json:"restarted_as_build_id"`
	// ReusedFrom is null unless that build is the account's own.
	ReusedFrom *store.BuildID `json:"reused_from_build_id"`
	// Network is there if the build had one.
	Network *adminapi.Network `json:"network,omitempty"`
}

// An apiBuildOutput is an output of a build that succeeded.
type apiBuildOutput struct {
	Name         string `json:"name"`
	Path         string `json:"path"`
	NarHash      string `json:"nar_hash"`
	NarSizeBytes uint64 `json:"nar_size_bytes"`
}

// An apiTime is a time as ISO 8601 has it, in UTC, to the second.
type apiTime struct{ time.Time }

// MarshalText implements encoding.TextMarshaler.
func (t apiTime) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// MarshalJSON implements json.Marshaler, over that of time.Time.
func (t apiTime) MarshalJSON() ([]byte, error) { return []byte(`"` + t.String() + `"`), nil }

func (t apiTime) String() string { return t.UTC().Format("2006-01-02T15:04:05Z") }

// optTime is a time that may not be known.
func optTime(t time.Time) *apiTime {
	if t.IsZero() {
		return nil
	}
	return &apiTime{t}
}

// optID is an id that may not be there.
func optID(id store.BuildID) *store.BuildID {
	if id == 0 {
		return nil
	}
	return &id
}

// newAPIBuild makes the object of a build for the account that owns it; now is
// what a build that goes on is measured by.
func newAPIBuild(ctx context.Context, st *store.Store, b *store.Build, now time.Time) (apiBuild, error) {
	queued, ran := buildTimes(b, now)
	o := apiBuild{
		BuildID: b.ID, CreateTime: apiTime{b.Created}, StartTime: optTime(b.Started),
		QueueTimeSeconds: inSeconds(queued), DurationSeconds: inSeconds(ran),
		BuildStatus: b.Status, Status: b.Status, StatusMessage: b.Error,
		CPUCount: b.CPUs, AllocatedMegabytes: b.MemoryMiB, CPUSeconds: b.CPUSeconds,
		PeakMemoryUseKilobytes: b.PeakMemory >> 10, PeakStorageKilobytes: b.PeakStorage >> 10,
		DerivationPath: string(b.DrvPath), System: b.System,
		Outputs: []apiBuildOutput{}, Tags: b.Tags,
		RestartOf: optID(b.RestartOf), RestartedAs: optID(b.RestartedAs),
		Network: tellableNetwork(b.Network),
	}
	if o.Tags == nil {
		o.Tags = map[string]string{}
	}
	for _, out := range b.Outputs {
		o.Outputs = append(o.Outputs, apiBuildOutput{out.Name, string(out.Path), out.NarHash.String(), out.NarSize})
	}
	if b.ReusedFrom != 0 {
		_, err := ownBuild(ctx, st, b.Account, b.ReusedFrom)
		switch {
		case err == nil:
			o.ReusedFrom = optID(b.ReusedFrom)
		case !errors.Is(err, store.ErrNotFound):
			return o, err
		}
	}
	return o, nil
}

// ownBuild returns a build of an account; that of another is
// store.ErrNotFound, like one that does not exist.
func ownBuild(ctx context.Context, st *store.Store, a store.AccountID, id store.BuildID) (*store.Build, error) {
	b, err := st.Build(ctx, id)
	if err == nil && b.Account != a {
		return nil, store.ErrNotFound
	}
	return b, err
}

// buildTimes returns how long a build waited in the queue, and how long it ran.
func buildTimes(b *store.Build, now time.Time) (queued, ran time.Duration) {
	end := b.Stopped
	if end.IsZero() {
		end = now
	}
	if b.Started.IsZero() {
		return max(0, end.Sub(b.Created)), 0
	}
	return max(0, b.Started.Sub(b.Created)), max(0, end.Sub(b.Started))
}

// discarded reports whether a build ended for a reason of ours.
func discarded(b *store.Build) bool {
	s := reuse.Status(b.Status)
	return s == reuse.InternalError || s == reuse.OutOfMemory
}

// inSeconds is a time in seconds, to the millisecond.
func inSeconds(d time.Duration) float64 {
	return float64(d.Round(time.Millisecond)) / float64(time.Second)
}
