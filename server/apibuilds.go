package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"nbd/store"
)

// filterFlags select builds.
var filterFlags = []apiFlag{
	{"--tags", "K:V,…", "those that have all these tags"},
	{"--status", "S,…", "those with one of these statuses; client_error: those that were refused, too"},
	{"--create-time-from", "TIME", "those created then or later (2026-11-30, or 2026-11-30T18:00:00Z)"},
	{"--create-time-to", "TIME", "those created before"},
	{"--reused", "", "requests that were answered or refused without a run, too"},
	{"--limit", "N", "at most so many, the newest"},
}

// buildCommands are the commands about builds.
func buildCommands() []apiCommand {
	return []apiCommand{
		{name: "builds list", flags: filterFlags, need: BuildRead, run: listBuilds,
			help: "list builds, the newest first",
			more: fmt.Sprintf("The list is of builds that ran. A request for which nothing was run has an id, too: --reused\n"+
				"lists all of them, --status client_error those that were refused, such as for a monthly limit.\n"+
				"In the shell the list ends after %d builds; --limit 0 lists all.", shellBuilds),
			text: listText(buildHead, "no builds", printBuildRow)},
		{name: "builds show", args: "ID", need: BuildRead, run: showBuild,
			help: "show one build", text: textOf(printBuild), complete: completeBuild},
		{name: "why", args: "ID", need: BuildRead, run: why, text: textOf(printWhy), complete: completeBuild,
			help: "say how a request for a build was answered, and why",
			more: "Each check has a line, in their order; the one that decided is marked."},
	}
}

// shellBuilds is how many builds the shell lists unless it is told.
const shellBuilds = 50

// buildPage is how many builds are read from the store at once.
const buildPage = 200

// maxFilterItems bounds the items of one filter.
const maxFilterItems = 100

// parseFilter reads filterFlags. Its limit is 0 for none.
func (c *apiCall) parseFilter() (store.BuildFilter, error) {
	f := store.BuildFilter{}
	var err error
	if f.From, err = c.timeFlag("--create-time-from"); err != nil {
		return f, err
	}
	if f.To, err = c.timeFlag("--create-time-to"); err != nil {
		return f, err
	}
	for _, v := range c.flags["--status"] {
		for _, s := range splitList(v) {
			if !slices.Contains(buildStatuses, s) {
				return f, usagef("there is no status %q; there are %s", clip(s), strings.Join(buildStatuses, ", "))
			}
			f.Status = append(f.Status, s)
		}
	}
	tags, err := parseTags(c.flags["--tags"])
	if err != nil {
		return f, err
	}
	if len(f.Status) > maxFilterItems || len(tags) > maxFilterItems {
		return f, usagef("a filter has more than %d items", maxFilterItems)
	}
	if v, ok := c.flag("--limit"); ok {
		if f.Limit, err = strconv.Atoi(v); err != nil || f.Limit < 0 {
			return f, usagef("--limit %q is not a number from 0 on", clip(v))
		}
	} else if c.text {
		f.Limit = shellBuilds
	}
	f.Reused = c.has("--reused")
	f.Refused = slices.Contains(f.Status, store.StatusClientError) // a run hardly ever has that end
	if len(tags) > 0 {
		f.Match = func(b *store.Build) bool { return hasTags(b, tags) }
	}
	return f, nil
}

var buildStatuses = []string{store.StatusPending, store.StatusRunning, store.StatusBuilt, store.StatusBuildFailed,
	store.StatusCancelled, store.StatusTimeout, store.StatusInternalError, store.StatusOutOfMemory,
	store.StatusMaxMemoryExceeded, store.StatusLogLimit, store.StatusClientDisconnect, store.StatusClientError}

// A tag is what a build was marked with.
type tag struct{ name, value string }

// parseTags reads lists of NAME:VALUE.
func parseTags(lists []string) (tags []tag, err error) {
	for _, list := range lists {
		for _, item := range splitList(list) {
			name, value, ok := strings.Cut(item, ":")
			if !ok || name == "" {
				return nil, usagef("tag %q is not NAME:VALUE", clip(item))
			}
			tags = append(tags, tag{name, value})
		}
	}
	return tags, nil
}

func hasTags(b *store.Build, tags []tag) bool {
	for _, t := range tags {
		if v, ok := b.Tags[t.name]; !ok || v != t.value {
			return false
		}
	}
	return true
}

// splitList splits at commas; empty items are dropped.
func splitList(s string) []string {
	return slices.DeleteFunc(strings.Split(s, ","), func(item string) bool { return item == "" })
}

// timeFlag reads a flag that is a time; the zero time if it was not given.
func (c *apiCall) timeFlag(name string) (time.Time, error) {
	v, ok := c.flag(name)
	if !ok {
		return time.Time{}, nil
	}
	for _, layout := range []string{time.RFC3339, "2006-01-02T15:04:05", "2006-01-02"} {
		if t, err := time.Parse(layout, v); err == nil {
			return t, nil
		}
	}
	if n, err := strconv.ParseInt(v, 10, 64); err == nil && n >= 0 && n < 1<<40 {
		return time.Unix(n, 0), nil
	}
	return time.Time{}, usagef("%s %q is no time; write it like 2026-11-30 or 2026-11-30T18:00:00Z", name, clip(v))
}

// builds returns the builds of an account that f selects, the newest first,
// read page by page.
func (s *Server) builds(ctx context.Context, a store.AccountID, f store.BuildFilter) apiSeq[*store.Build] {
	return func(yield func(*store.Build, error) bool) {
		left := f.Limit
		for {
			f.Limit = buildPage
			if left > 0 {
				f.Limit = min(left, buildPage)
			}
			page, err := s.store.Builds(ctx, a, f)
			if err != nil {
				yield(nil, err)
				return
			}
			for i := range page {
				if !yield(&page[i], nil) {
					return
				}
			}
			if len(page) < f.Limit || left == len(page) {
				return
			}
			if left > 0 {
				left -= len(page)
			}
			f.Before = page[len(page)-1].ID
		}
	}
}

func listBuilds(ctx context.Context, c *apiCall) (any, error) {
	f, err := c.parseFilter()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	return apiSeq[apiBuild](func(yield func(apiBuild, error) bool) {
		for b, err := range c.server.builds(ctx, c.account(), f) {
			var o apiBuild
			if err == nil {
				o, err = newAPIBuild(ctx, c.server.store, b, now)
			}
			if !yield(o, err) || err != nil {
				return
			}
		}
	}), nil
}

// build returns the build of the account that the first argument names.
func (c *apiCall) build(ctx context.Context) (*store.Build, error) {
	id, err := c.buildID()
	if err != nil {
		return nil, err
	}
	b, err := ownBuild(ctx, c.server.store, c.account(), id)
	if errors.Is(err, store.ErrNotFound) {
		return nil, noBuild(id)
	}
	return b, err
}

// noBuild is the answer about a build that is not there, or not the account's.
func noBuild(id store.BuildID) error { return notFoundf("there is no build %d", id) }

func showBuild(ctx context.Context, c *apiCall) (any, error) {
	b, err := c.build(ctx)
	if err != nil {
		return nil, err
	}
	return newAPIBuild(ctx, c.server.store, b, time.Now())
}

const buildHead = "BUILD     CREATED              STATUS               TIME     CPU  DERIVATION"

func printBuildRow(w io.Writer, b apiBuild) error {
	_, err := fmt.Fprintf(w, "%-8d  %s %-18s %6ss %6ds  %s\n", b.BuildID, b.CreateTime, b.Status,
		strconv.FormatFloat(b.DurationSeconds, 'f', 1, 64), b.CPUSeconds, strings.TrimPrefix(b.DerivationPath, "/nix/store/"))
	return err
}

func printBuild(w io.Writer, b apiBuild) error {
	rows := [][2]string{
		{"build", fmt.Sprint(b.BuildID)}, {"derivation", b.DerivationPath}, {"system", b.System},
		{"status", b.Status}, {"message", b.StatusMessage}, {"created", b.CreateTime.String()},
		{"queued for", fmt.Sprintf("%.1f s", b.QueueTimeSeconds)},
	}
	if b.StartTime != nil {
		rows = append(rows, [][2]string{{"started", b.StartTime.String()}, {"took", fmt.Sprintf("%.1f s", b.DurationSeconds)},
			{"CPU time", fmt.Sprintf("%d s on %d CPUs", b.CPUSeconds, b.CPUCount)},
			{"memory", fmt.Sprintf("%d MiB at most, of %d MiB", b.PeakMemoryUseKilobytes>>10, b.AllocatedMegabytes)},
			{"disk", fmt.Sprintf("%d MiB at most", b.PeakStorageKilobytes>>10)}}...)
	}
	for _, other := range []struct {
		name string
		id   *store.BuildID
	}{{"restart of", b.RestartOf}, {"restarted as", b.RestartedAs}, {"reused from", b.ReusedFrom}} {
		if other.id != nil {
			rows = append(rows, [2]string{other.name, fmt.Sprintf("build %d", *other.id)})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(b.Tags)) {
		rows = append(rows, [2]string{"tag", name + ":" + b.Tags[name]})
	}
	for _, o := range b.Outputs {
		rows = append(rows, [2]string{"output", fmt.Sprintf("%s %s, %d bytes, %s", o.Name, o.Path, o.NarSizeBytes, o.NarHash)})
	}
	return printRows(w, append(rows, b.Network.Rows()...))
}

// An apiWhy says how a request was answered, and why.
type apiWhy struct {
	BuildID   store.BuildID    `json:"build_id"`
	Status    string           `json:"status"`
	Decisions []store.Decision `json:"decisions"`
}

func why(ctx context.Context, c *apiCall) (any, error) {
	b, err := c.build(ctx)
	if err != nil {
		return nil, err
	}
	w := apiWhy{b.ID, b.Status, b.Decisions}
	if w.Decisions == nil {
		w.Decisions = []store.Decision{}
	}
	return w, nil
}

func printWhy(w io.Writer, why apiWhy) error {
	var text strings.Builder
	fmt.Fprintf(&text, "build %d: %s\n", why.BuildID, why.Status)
	for _, d := range why.Decisions {
		mark := " "
		if d.Taken {
			mark = "*"
		}
		fmt.Fprintf(&text, "%s %-12s %s\n", mark, d.Check, strings.ReplaceAll(d.Reason, "\n", " "))
	}
	_, err := io.WriteString(w, text.String())
	return err
}

// completeBuild completes the id of a build.
func completeBuild(ctx context.Context, c *apiCall, args []string) []string {
	return completeBuilds(ctx, c, args, store.BuildFilter{Limit: shellBuilds})
}

// completeBuilds completes the id of a build that f selects.
func completeBuilds(ctx context.Context, c *apiCall, args []string, f store.BuildFilter) (ids []string) {
	if len(args) != 1 || !c.Client.Can(BuildRead) {
		return nil
	}
	for b, err := range c.server.builds(ctx, c.account(), f) {
		if err != nil {
			return nil
		}
		ids = append(ids, fmt.Sprint(b.ID))
	}
	return ids
}
