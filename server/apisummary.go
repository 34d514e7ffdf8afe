package server

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"nbd/reuse"
	"nbd/store"
)

// summaryCommands sum builds up.
func summaryCommands() []apiCommand {
	return []apiCommand{
		{name: "builds summary", flags: summaryFlags(), need: BuildRead, run: summarizeBuilds,
			help: "sum up builds", text: textOf(printSummary)},
		{name: "usage", flags: []apiFlag{{"--month", "YYYY-MM", "of that month (UTC), not of this one"}}, need: AccountRead,
			run: showUsage, help: "what this month's builds took, and what is left of the limit", text: textOf(printUsage)},
	}
}

// summaryFlags are filterFlags without a limit.
func summaryFlags() []apiFlag { return filterFlags[:len(filterFlags)-1] }

// An apiSummary sums up builds. Those that ended for a reason of the server's
// are discarded; they are no failures.
type apiSummary struct {
	BuildCount           int     `json:"build_count"`
	RunningBuildCount    int     `json:"running_build_count"` // those that have not ended
	DiscardedBuildCount  int     `json:"discarded_build_count"`
	FailedBuildCount     int     `json:"failed_build_count"`
	SuccessfulBuildCount int     `json:"successful_build_count"`
	TotalCPUSeconds      int64   `json:"total_cpu_seconds"`
	BillableCPUSeconds   int64   `json:"billable_cpu_seconds"`
	TotalDurationSeconds float64 `json:"total_duration_seconds"`
	// WallTimeSeconds is from the first start to the last end.
	WallTimeSeconds             float64 `json:"wall_time_seconds"`
	TotalOutputNarSizeKilobytes uint64  `json:"total_output_nar_size_kilobytes"`
	duration                    time.Duration
	first, last                 time.Time
	outputBytes                 uint64
}

func summarizeBuilds(ctx context.Context, c *apiCall) (any, error) {
	f, err := c.parseFilter()
	if err != nil {
		return nil, err
	}
	f.Limit = 0
	s := apiSummary{}
	now := time.Now()
	for b, err := range c.server.builds(ctx, c.account(), f) {
		if err != nil {
			return nil, err
		}
		s.add(b, now)
	}
	s.finish()
	return s, nil
}

// add counts one build.
func (s *apiSummary) add(b *store.Build, now time.Time) {
	s.BuildCount++
	switch status := reuse.Status(b.Status); {
	case !status.Ended():
		s.RunningBuildCount++
	case status == reuse.Built:
		s.SuccessfulBuildCount++
	case discarded(b):
		s.DiscardedBuildCount++
	default:
		s.FailedBuildCount++
	}
	s.TotalCPUSeconds += max(b.CPUSeconds, b.LimitSeconds)
	s.BillableCPUSeconds += b.CPUSeconds
	for _, o := range b.Outputs {
		s.outputBytes += o.NarSize
	}
	_, ran := buildTimes(b, now)
	if b.Reused || b.Started.IsZero() {
		return
	}
	s.duration += ran
	if s.first.IsZero() || b.Started.Before(s.first) {
		s.first = b.Started
	}
	if end := b.Started.Add(ran); end.After(s.last) {
		s.last = end
	}
}

// finish rounds the sums.
func (s *apiSummary) finish() {
	s.TotalDurationSeconds = inSeconds(s.duration)
	s.WallTimeSeconds = inSeconds(s.last.Sub(s.first))
	s.TotalOutputNarSizeKilobytes = (s.outputBytes + 1023) >> 10
}

func printSummary(w io.Writer, s apiSummary) error {
	return printRows(w, [][2]string{
		{"builds", fmt.Sprint(s.BuildCount)},
		{"succeeded", fmt.Sprint(s.SuccessfulBuildCount)},
		{"failed", fmt.Sprint(s.FailedBuildCount)},
		{"discarded", fmt.Sprint(s.DiscardedBuildCount)},
		{"running", fmt.Sprint(s.RunningBuildCount)},
		{"CPU time", fmt.Sprintf("%d s, of which %d s count", s.TotalCPUSeconds, s.BillableCPUSeconds)},
		{"run time", fmt.Sprintf("%.1f s, within %.1f s", s.TotalDurationSeconds, s.WallTimeSeconds)},
		{"outputs", fmt.Sprintf("%d KiB", s.TotalOutputNarSizeKilobytes)},
	})
}

// An apiUsage is what the builds of a month took.
type apiUsage struct {
	From                 apiTime `json:"from"`
	To                   apiTime `json:"to"` // the first moment of the next month, or now
	BuildCount           int64   `json:"build_count"`
	SuccessfulBuildCount int64   `json:"successful_build_count"`
	ReusedBuildCount     int64   `json:"reused_build_count"`
	BillableBuildCount   int64   `json:"billable_build_count"`
	TotalDurationSeconds float64 `json:"total_duration_seconds"`
	BillableCPUSeconds   int64   `json:"billable_cpu_seconds"`
	// LimitCPUSeconds counts against the limit, of which LeftCPUSeconds are left;
	// the limit and what is left are null without one.
	LimitCPUSeconds int64    `json:"limit_cpu_seconds"`
	MaxCPUHours     *float64 `json:"max_cpu_hours_per_month"`
	LeftCPUSeconds  *int64   `json:"left_cpu_seconds"`
}

func showUsage(ctx context.Context, c *apiCall) (any, error) {
	now := time.Now().UTC()
	month := now
	if v, ok := c.flag("--month"); ok {
		var err error
		if month, err = time.Parse("2006-01", v); err != nil {
			return nil, usagef("--month %q is no month; write it like 2026-11", clip(v))
		}
	}
	from := time.Date(month.Year(), month.Month(), 1, 0, 0, 0, 0, time.UTC)
	to := from.AddDate(0, 1, 0)
	sum, err := c.server.store.Usage(ctx, c.account(), from)
	if err != nil {
		return nil, err
	}
	u := apiUsage{From: apiTime{from}, To: apiTime{to}, BuildCount: sum.Builds, SuccessfulBuildCount: sum.Succeeded,
		ReusedBuildCount: sum.Reused, TotalDurationSeconds: inSeconds(sum.Wall),
		BillableCPUSeconds: sum.CPUSeconds, LimitCPUSeconds: sum.LimitSeconds}
	if to.After(now) && !from.After(now) {
		u.To = apiTime{now}
	}
	for b, err := range c.server.builds(ctx, c.account(), store.BuildFilter{From: from, To: to}) {
		if err != nil {
			return nil, err
		}
		if b.CPUSeconds > 0 {
			u.BillableBuildCount++
		}
	}
	if hours := c.monthlyLimit(); hours != nil {
		left := max(0, int64(*hours*3600)-sum.LimitSeconds)
		u.MaxCPUHours, u.LeftCPUSeconds = hours, &left
	}
	return u, nil
}

func printUsage(w io.Writer, u apiUsage) error {
	rows := [][2]string{
		{"month", u.From.Format("2006-01")},
		{"builds", fmt.Sprint(u.BuildCount)},
		{"succeeded", fmt.Sprint(u.SuccessfulBuildCount)},
		{"reused", fmt.Sprint(u.ReusedBuildCount)},
		{"run time", hours(u.TotalDurationSeconds)},
		{"CPU time", hours(float64(u.BillableCPUSeconds))},
	}
	if u.LeftCPUSeconds == nil {
		rows = append(rows, [2]string{"limit", "none (max-cpu-hours-per-month)"})
	} else {
		rows = append(rows, [2]string{"limit", hours(*u.MaxCPUHours * 3600)}, [2]string{"left", hours(float64(*u.LeftCPUSeconds))})
	}
	return printRows(w, rows)
}

// hours shows a time in seconds, and in hours.
func hours(seconds float64) string { return fmt.Sprintf("%.0f s (%.2f h)", seconds, seconds/3600) }

// printRows writes names with their values; rows without a value are left out.
func printRows(w io.Writer, rows [][2]string) error {
	width := 0
	for _, r := range rows {
		width = max(width, len(r[0]))
	}
	var text strings.Builder
	for _, r := range rows {
		if r[1] != "" {
			fmt.Fprintf(&text, "%-*s  %s\n", width, r[0], strings.ReplaceAll(r[1], "\n", " "))
		}
	}
	_, err := io.WriteString(w, text.String())
	return err
}
