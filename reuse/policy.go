package reuse

// A Status is how a run ended, or that it did not yet. The words are those of
// records, of the API and of the product's table of ends.
type Status string

// The statuses.
const (
	Pending           Status = "pending"
	Running           Status = "running"
	Built             Status = "built"
	BuildFailed       Status = "build_failed"
	Timeout           Status = "timeout"
	InternalError     Status = "internal_error"
	LogLimit          Status = "log_limit"
	OutOfMemory       Status = "out_of_memory"       // less than the most there is
	MaxMemoryExceeded Status = "max_memory_exceeded" // with the most there is
	ClientDisconnect  Status = "client_disconnect"
	Cancelled         Status = "cancelled"
	ClientError       Status = "client_error"
)

// Ended reports whether s is an end.
func (s Status) Ended() bool { return s != Pending && s != Running && s != "" }

// Permanent reports whether the same run would end so again for a reason of
// its own: a success, or a failure of the builder or of its outputs. Only
// permanent ends may stand in for another run; timeouts may under rules of
// their own, which compare limits.
func (s Status) Permanent() bool { return s == Built || s == BuildFailed }

// Retried reports whether a run that ended so is tried again at once, without
// being asked.
func (s Status) Retried() bool { return s == InternalError || s == OutOfMemory }

// Counts reports whether the CPU time of a run that ended so counts against a
// limit of its account: what it pays for, and what it had thrown away.
func (s Status) Counts() bool { return s.Costs() || s == ClientDisconnect || s == Cancelled }

// Costs reports whether the CPU time of a run that ended so is the account's to
// pay.
func (s Status) Costs() bool {
	switch s {
	case Built, BuildFailed, Timeout, LogLimit, MaxMemoryExceeded:
		return true
	}
	return false
}
